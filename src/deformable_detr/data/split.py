"""Create validation and test splits from a dataset that has only a training split."""

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
from .issues import Issues
from .records import ImageRecord
from .validate import Report, find_splits
from .validate.repair import write_annotations

ROBOFLOW_COPY = re.compile(r"(.+)\.rf\.[^./\\]+\.[^./\\]+")  # augmented copies of one image: NAME.rf.HASH.jpg
SPLIT_ISSUES = ("split-missing", "splits-same")  # the issues that a new split fixes


@dataclass(frozen=True)
class SplitOptions:
    """How to split a dataset.

    Attributes:
        val: Share of the images for validation, 0..1.
        test: Share of the images for testing, 0..1.
        seed: Random seed.
        group: Regular expression; images with the same groups (or the same match) in their names stay together.
    """

    val: float = 0.2
    test: float = 0.0
    seed: int = 0
    group: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.val < 1 or not 0 <= self.test < 1 - self.val:
            shares = f"--val {self.val:g} --test {self.test:g}"
            raise UserError(f"{shares}: give shares such as 0.2, and leave images for training")
        try:
            re.compile(self.group or "")
        except re.error as error:
            raise UserError(f"--group-by {self.group!r} is not a regular expression ({error}); correct it") from None


def ensure_splittable(root: Path, data: DataConfig, options: SplitOptions) -> None:
    """Raise `UserError` if the dataset has no training split, or has a split that is to be created."""
    issues = Issues()
    splits = find_splits(root, data, issues)
    if data.train_split not in splits:
        raise UserError(next(issue.line for issue in issues if issue.split == data.train_split))
    for name, share in ((data.val_split, options.val), ("test", options.test)):
        if share and name in splits and splits[name].read(on_issue=issues.append)["images"]:
            hint = "train on it as it is" if name == data.val_split else "leave out --test"
            raise UserError(f"{root}: already has a '{name}' split, {splits[name].file}; {hint}")


def split_dataset(report: Report, out: Path, data: DataConfig, options: SplitOptions) -> tuple[int, int]:
    """Move images of the repaired copy `out` from its training split to new splits, with their objects.

    Copies by pixels, Roboflow's augmented copies of one image, and images of one `options.group` stay together.

    Returns:
        The number of images, and of groups that stay together.

    Raises:
        UserError: A split would be empty.
    """
    train_folder = out / data.train_split
    content = json.loads((train_folder / ROBOFLOW).read_text(encoding="utf-8"))
    if not content["images"]:
        lines = (issue.line for issue in report.errors if issue.code not in SPLIT_ISSUES)
        raise UserError(next(lines, f"{report.root}: has no images; add some"))
    train = next(split for split in report.splits if split.name == data.train_split)
    groups = _groups({image.id: image for image in train.images}, content["images"], options.group)
    classes: dict[int, set[int]] = defaultdict(set)
    for record in content["annotations"]:
        classes[record["image_id"]].add(record["category_id"])
    counts = [Counter(label for image_id in group for label in classes[image_id]) for group in groups]
    shares = {data.train_split: 1 - options.val - options.test, data.val_split: options.val}
    shares |= {"test": options.test} if options.test else {}
    names = assign_splits([len(group) for group in groups], counts, shares, options.seed)
    for name in shares:
        if name not in names:
            hint = "add images or give larger shares"
            if options.group is not None:
                hint = f"give another --group-by than {options.group!r}, {hint}"
            sizes = f"{len(content['images'])} images in {len(groups)} groups that stay together"
            raise UserError(f"{report.root}: {sizes} leave none for the '{name}' split; {hint}")
    split_of = {image_id: name for name, group in zip(names, groups, strict=True) for image_id in group}
    for name in shares:
        images = [record for record in content["images"] if split_of[record["id"]] == name]
        objects = [record for record in content["annotations"] if split_of[record["image_id"]] == name]
        if name != data.train_split:
            for record in images:
                os.renames(train_folder / record["file_name"], out / name / record["file_name"])
        write_annotations(out / name, content | {"images": images, "annotations": objects})
    return len(content["images"]), len(groups)


def assign_splits(
    sizes: Sequence[int], counts: Sequence[Mapping[int, int]], shares: Mapping[str, float], seed: int
) -> list[str]:
    """Assign groups of images to splits so that each split gets its share of each class, the rarest class first.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas, "On the stratification of multi-label data",
    ECML 2011, algorithm 1), large groups first.

    Args:
        sizes: Images per group.
        counts: Images with each class, per group.
        shares: Share of the images per split.
        seed: Random seed.
    """
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda group: -sizes[group])
    totals = sum((Counter(count) for count in counts), Counter[int]())
    # How many images, and images of each class, a split still needs.
    needed = {name: share * sum(sizes) for name, share in shares.items()}
    needed_of = {name: {label: share * n for label, n in totals.items()} for name, share in shares.items()}
    unassigned = Counter(label for count in counts for label in count)  # groups by class
    members: dict[int, list[int]] = defaultdict(list)
    for group in order:
        for label in counts[group]:
            members[label].append(group)
    assigned: dict[int, str] = {}

    def assign(group: int, label: int | None) -> None:
        name = max(shares, key=lambda name: (needed_of[name].get(label, 0) if label is not None else 0, needed[name]))
        assigned[group] = name
        needed[name] -= sizes[group]
        for group_label, count in counts[group].items():
            needed_of[name][group_label] -= count
            unassigned[group_label] -= 1

    while unassigned := +unassigned:
        rarest = min(unassigned, key=lambda label: (unassigned[label], label))
        for group in members[rarest]:
            if group not in assigned:
                assign(group, rarest)
    for group in order:
        if group not in assigned:
            assign(group, None)
    _balance(assigned, sizes, counts, needed, needed_of)
    return [assigned[group] for group in range(len(sizes))]


def _balance(
    assigned: dict[int, str],
    sizes: Sequence[int],
    counts: Sequence[Mapping[int, int]],
    needed: dict[str, float],
    needed_of: dict[str, dict[int, float]],
) -> None:
    """Move groups to splits that need images: with few images per class, all shares round in favor of training.

    No split is left empty if that can be avoided.
    """
    while True:
        poor = max(needed, key=lambda name: (name not in assigned.values(), needed[name]))
        rich = min(needed, key=lambda name: needed[name])
        candidates = [group for group, name in assigned.items() if name == rich]
        lack = min(needed[poor], -needed[rich])
        fitting = [group for group in candidates if sizes[group] < 2 * lack] if len(candidates) > 1 else []
        if poor not in assigned.values() and not fitting:  # take the smallest group of the split with most groups
            rich = max(needed, key=lambda name: sum(other == name for other in assigned.values()))
            candidates = [group for group, name in assigned.items() if name == rich]
            fitting = [min(candidates, key=lambda group: sizes[group])] if len(candidates) > 1 else []
        if not fitting:
            return
        gain = {label: need - needed_of[rich][label] for label, need in needed_of[poor].items()}
        group = max(fitting, key=lambda group: (sum(n * gain[label] for label, n in counts[group].items()), -group))
        assigned[group] = poor
        for name, sign in ((poor, -1), (rich, 1)):
            needed[name] += sign * sizes[group]
            for label, count in counts[group].items():
                needed_of[name][label] += sign * count


def _groups(images: Mapping[int, ImageRecord], records: list[dict[str, Any]], pattern: str | None) -> list[list[int]]:
    """Return the ids of images that stay together, in the order of their names."""
    leader: dict[int, int] = {}

    def find(image_id: int) -> int:
        while leader.setdefault(image_id, image_id) != image_id:
            image_id = leader[image_id]
        return image_id

    owner: dict[Any, int] = {}
    matched = False
    ordered = sorted(records, key=lambda record: record["file_name"])
    for record in ordered:
        image_id, name = record["id"], images[record["id"]].name
        keys: list[Any] = [images[image_id].digest]
        if copy := ROBOFLOW_COPY.fullmatch(name):
            keys.append(("roboflow", copy[1]))
        if pattern is not None and (match := re.search(pattern, name)):
            matched = True
            keys.append(("group", match.groups() or match[0]))
        for key in keys:
            if key is not None:
                leader[find(image_id)] = find(owner.setdefault(key, image_id))
    if pattern is not None and not matched:
        name = records[0]["file_name"] if records else ""
        raise UserError(f"--group-by {pattern!r} matches no file name, such as {name!r}; correct it")
    groups: dict[int, list[int]] = defaultdict(list)
    for record in ordered:
        groups[find(record["id"])].append(record["id"])
    return list(groups.values())
