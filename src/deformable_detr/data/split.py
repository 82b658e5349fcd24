"""A validation split, and a test split, out of the images of a set that has none."""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.schema import DataConfig
from ..utils.errors import UserError
from .discovery import ROBOFLOW
from .problems import ignore_problem
from .validate import Report, find_splits
from .validate.annotations import ImageRecord
from .validate.issues import Findings
from .validate.repair import write_annotations

ROBOFLOWS_COPY = re.compile(r"(.+)\.rf\.[^./\\]+\.[^./\\]+")  # one original, augmented several times: NAME.rf.HASH.jpg

UNDIVIDED = ("split-missing", "splits-same")  # the findings that a division is the mend of


@dataclass(frozen=True)
class Shares:
    """What part of the images the new splits get, 0..1, and which images stay together.

    group: the part of a file name that images of one scene share: the groups of the expression, or all that it matches.
    """

    val: float = 0.2
    test: float = 0.0
    seed: int = 0
    group: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.val < 1 or not 0 <= self.test < 1 - self.val:
            raise UserError(
                f"--val {self.val:g} --test {self.test:g}: give parts of the images, as 0.2, and leave some to train on"
            )
        try:
            re.compile(self.group or "")
        except re.error as error:
            raise UserError(f"--group-by {self.group!r} is no regular expression ({error})") from None


def refuse_division(root: Path, data: DataConfig, shares: Shares) -> None:
    """Raises `UserError` where a set has the splits that are to be made, or no training split to make them of."""
    found = Findings()
    splits = find_splits(root, data, found)
    if data.train_split not in splits:
        raise UserError(next(finding.line for finding in found if finding.split == data.train_split))
    for name, share in ((data.val_split, shares.val), ("test", shares.test)):
        if share and name in splits and splits[name].read(on_problem=ignore_problem)["images"]:
            mend = "train on it as it is" if name == data.val_split else "leave out --test"
            raise UserError(f"{root}: has a '{name}' split already, {splits[name].file}; {mend}")


def divide(report: Report, out: Path, data: DataConfig, shares: Shares) -> tuple[int, int]:
    """Moves images of the repaired copy `out` from its training split into new ones, with their objects.

    Returns how many images there are and in how many groups that stay together: copies by their pixels, Roboflow's
    augmented copies of one image, and what `shares.group` says. Raises `UserError` where a split would be empty.
    """
    folder = out / data.train_split
    content = json.loads((folder / ROBOFLOW).read_text(encoding="utf-8"))
    if not content["images"]:
        lines = (finding.line for finding in report.errors if finding.code not in UNDIVIDED)
        raise UserError(next(lines, f"{report.root}: has no images"))
    split = next(split for split in report.splits if split.name == data.train_split)
    groups = _groups({picture.id: picture for picture in split.pictures}, content["images"], shares.group)
    classes: dict[int, set[int]] = defaultdict(set)
    for record in content["annotations"]:
        classes[record["image_id"]].add(record["category_id"])
    counts = [Counter(label for number in group for label in classes[number]) for group in groups]
    parts = {data.train_split: 1 - shares.val - shares.test, data.val_split: shares.val, "test": shares.test}
    parts = {name: share for name, share in parts.items() if share}
    names = assigned([len(group) for group in groups], counts, parts, shares.seed)
    for name in parts:
        if name not in names:
            what = f"{len(content['images'])} images in {len(groups)} groups that stay together"
            mend = "add images or give larger parts"
            if shares.group is not None:
                mend = f"give another --group-by than {shares.group!r}, {mend}"
            raise UserError(f"{report.root}: {what} leave none for the '{name}' split; {mend}")
    part_of = {number: name for name, group in zip(names, groups, strict=True) for number in group}
    for name in parts:
        images = [record for record in content["images"] if part_of[record["id"]] == name]
        objects = [record for record in content["annotations"] if part_of[record["image_id"]] == name]
        if name != data.train_split:
            (out / name).mkdir(exist_ok=True)
            for record in images:
                _move(folder, out / name, record["file_name"])
        write_annotations(out / name, content | {"images": images, "annotations": objects})
    return len(content["images"]), len(groups)


def assigned(
    sizes: Sequence[int], counts: Sequence[Mapping[int, int]], shares: Mapping[str, float], seed: int
) -> list[str]:
    """A split for each group of images: the splits get their shares of each class, the rarest class first.

    sizes: images in each group; counts: how many of them have each class. Iterative stratification (Sechidis,
    Tsoumakas and Vlahavas, "On the stratification of multi-label data", ECML 2011, algorithm 1), large groups first.
    """
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda group: -sizes[group])
    wanted = {name: share * sum(sizes) for name, share in shares.items()}
    totals = sum((Counter(count) for count in counts), Counter[int]())
    wanted_of = {name: {label: share * n for label, n in totals.items()} for name, share in shares.items()}
    left = Counter(label for count in counts for label in count)  # groups that are not assigned yet, by class
    members: dict[int, list[int]] = defaultdict(list)
    for group in order:
        for label in counts[group]:
            members[label].append(group)
    found: dict[int, str] = {}

    def give(group: int, label: int | None) -> None:
        name = max(shares, key=lambda name: (wanted_of[name].get(label, 0) if label is not None else 0, wanted[name]))
        found[group] = name
        wanted[name] -= sizes[group]
        for own, number in counts[group].items():
            wanted_of[name][own] -= number
            left[own] -= 1

    while left := +left:
        rarest = min(left, key=lambda label: (left[label], label))
        for group in members[rarest]:
            if group not in found:
                give(group, rarest)
    for group in order:
        if group not in found:
            give(group, None)
    _balance(found, sizes, counts, wanted, wanted_of)
    return [found[group] for group in range(len(sizes))]


def _balance(
    found: dict[int, str],
    sizes: Sequence[int],
    counts: Sequence[Mapping[int, int]],
    wanted: dict[str, float],
    wanted_of: dict[str, dict[int, float]],
) -> None:
    """Moves groups to splits that lack images: where each class has few, all of them round in favour of training.

    wanted, wanted_of: what the splits still lack, of images and of each class. No split is left empty that need not be.
    """
    while True:
        poor = max(wanted, key=lambda name: (name not in found.values(), wanted[name]))
        rich = min(wanted, key=lambda name: wanted[name])
        own = [group for group, name in found.items() if name == rich]
        lack = min(wanted[poor], -wanted[rich])
        fitting = [group for group in own if sizes[group] < 2 * lack] if len(own) > 1 else []
        if poor not in found.values() and not fitting:  # the smallest, where another stays
            rich = max(wanted, key=lambda name: sum(other == name for other in found.values()))
            own = [group for group, name in found.items() if name == rich]
            fitting = [min(own, key=lambda group: sizes[group])] if len(own) > 1 else []
        if not fitting:
            return

        def gain(group: int, poor: str = poor, rich: str = rich) -> tuple[float, int]:
            classes = counts[group].items()
            return sum(n * (wanted_of[poor][c] - wanted_of[rich][c]) for c, n in classes), -group

        group = max(fitting, key=gain)
        found[group] = poor
        for name, sign in ((poor, -1), (rich, 1)):
            wanted[name] += sign * sizes[group]
            for label, number in counts[group].items():
                wanted_of[name][label] += sign * number


def _groups(
    pictures: Mapping[int, ImageRecord], records: Sequence[dict[str, Any]], pattern: str | None
) -> list[list[int]]:
    """Ids of the images that stay together, in the order of their names."""
    leader: dict[int, int] = {}

    def first(number: int) -> int:
        while leader.setdefault(number, number) != number:
            number = leader[number]
        return number

    owner: dict[Any, int] = {}
    matched = False
    for record in sorted(records, key=lambda record: record["file_name"]):
        number, name = record["id"], pictures[record["id"]].name
        keys: list[Any] = [pictures[number].digest]
        if copy := ROBOFLOWS_COPY.fullmatch(name):
            keys.append(("roboflow", copy[1]))
        if pattern is not None and (match := re.search(pattern, name)):
            matched = True
            keys.append(("group", match.groups() or match[0]))
        for key in keys:
            if key is not None:
                leader[first(number)] = first(owner.setdefault(key, number))
    if pattern is not None and not matched:
        name = records[0]["file_name"] if records else ""
        raise UserError(f"--group-by {pattern!r} matches no file name, such as {name!r}")
    groups: dict[int, list[int]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record["file_name"]):
        groups[first(record["id"])].append(record["id"])
    return list(groups.values())


def _move(folder: Path, other: Path, name: str) -> None:
    place = other / name
    place.parent.mkdir(parents=True, exist_ok=True)
    os.rename(folder / name, place)
    for parent in (folder / name).parents:  # folders that are empty now
        if parent == folder or any(parent.iterdir()):
            break
        parent.rmdir()
