"""The classes over all splits: the same in each, with enough objects to learn from; and images without any object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .annotations import Split
from .boxes import clipped, sizes_of, unit_fault
from .issues import IMBALANCE, RARE, Findings


def class_counts(split: Split) -> dict[int, int]:
    """Objects of each listed category, crowds not counted."""
    counts = Counter(split.labels[~split.crowds].tolist())
    return {number: counts.get(number, 0) for number in split.categories}


def check_classes(splits: Sequence[Split], train: Split | None, val: Split | None, found: Findings) -> None:
    """Adds what is wrong with the classes; train, val: the splits to train and to validate on, where they exist."""
    for split in splits:
        _find_empty(split, found)
        if not _usable(split):
            _tell_none(split, split is train, found)
        if train is not None and split is not train:
            _compare_lists(train, split, found)
    counts = {id(split): class_counts(split) for split in splits}
    names: dict[int, tuple[str, Split]] = {}
    for split in splits:
        for number, name in split.categories.items():
            names.setdefault(number, (name, split))
    for number, (name, split) in names.items():
        if not any(counts[id(other)].get(number) for other in splits):
            found.add("class-unused", split.file, "", f"lists the class {name!r} (id {number}), which has no objects",
                      split=split.name)  # fmt: skip
    if train is None:
        return
    mine = counts[id(train)]
    other = counts[id(val)] if val is not None else None
    for number, name in train.categories.items():
        here, there = mine[number], other.get(number, 0) if other is not None else None
        if not here and there and val is not None:
            what = f"has {there} objects of class {name!r}, of which {train.file} has none to train on"
            found.add("class-only-in-val", val.file, "", what, split=val.name)
        if here and there == 0:
            what = f"has {here} objects of class {name!r}, which has none to validate on"
            found.add("class-not-in-val", train.file, "", what, split=train.name)
        if 0 < here < RARE:
            what = f"has {here} object{'s' * (here > 1)} of class {name!r} to train on"
            found.add("class-rare", train.file, "", what, split=train.name)
    present = {number: count for number, count in mine.items() if count}
    if present and max(present.values()) > IMBALANCE * min(present.values()):
        most, least = max(present, key=present.__getitem__), min(present, key=present.__getitem__)
        what = (
            f"has {present[most]} objects of {train.categories[most]!r}, but {present[least]} of "
            f"{train.categories[least]!r}: {present[most] / present[least]:.0f} times as many"
        )
        found.add("class-imbalance", train.file, "", what, split=train.name)


def _usable(split: Split) -> bool:
    """Whether an object that is no crowd has an area in its image, or would have in the unit that its box is in."""
    kept = ~split.crowds
    boxes, limits = split.boxes[kept], sizes_of(split)[split.images[kept]]
    return bool(clipped(boxes, limits)[1].any() or unit_fault(boxes, limits))


def _tell_none(split: Split, to_train: bool, found: Findings) -> None:
    if not to_train:
        found.add("no-objects", split.file, "", "has no objects to measure with", split=split.name)
        return
    if not split.crowds.all():
        what = "has no box with an area inside its image, so nothing to learn from"
        found.add("no-training-objects", split.file, "", what, "mend the boxes", split=split.name)
        return
    where = " (a row an object in labels/…/NAME.txt for images/…/NAME.jpg)" * (split.source.format == "yolo")
    found.add("no-training-objects", split.file, "", "has no objects to learn from",
              f"label its images{where}", split=split.name)  # fmt: skip


def _find_empty(split: Split, found: Findings) -> None:
    full = set(split.images.tolist())
    for index, picture in enumerate(split.pictures):
        if index not in full and not picture.broken and not picture.missing:
            found.add("image-empty", split.file, f"images[{picture.position}]", f"({picture.name!r}) has no objects",
                      split=split.name, section="images", position=picture.position, image=picture.path)  # fmt: skip


def _compare_lists(train: Split, split: Split, found: Findings) -> None:
    """The categories of a split beside those to train on."""
    counts = class_counts(split)
    for number, name in sorted(split.categories.items()):
        known = train.categories.get(number)
        if known is None and counts[number]:
            what = f"has {counts[number]} objects of class {name!r} (id {number}), which {train.file} does not list"
            found.add("class-not-in-train", split.file, "", what, split=split.name)
        elif known not in (None, name):
            what = f"calls id {number} {name!r}, {train.file} {known!r}"
            found.add("category-renamed", split.file, "", what, split=split.name)
