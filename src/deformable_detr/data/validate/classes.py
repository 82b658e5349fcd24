"""Checks of the classes over all splits: equal lists, enough objects, and images without objects."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..issues import IMBALANCE, RARE, Issues
from .annotations import Split
from .boxes import clip_boxes, object_limits, wrong_unit

MIN_REPEAT = 1.5  # repeat factor of the rarest class from which on repetition is suggested


def class_counts(split: Split) -> dict[int, int]:
    """Return the number of objects per listed category, without crowds."""
    counts = Counter(split.category_ids[~split.crowds].tolist())
    return {category_id: counts.get(category_id, 0) for category_id in split.categories}


def check_classes(splits: Sequence[Split], train: Split | None, val: Split | None, issues: Issues) -> None:
    """Add the issues of the classes; `train` and `val` are the training and validation split, if they exist."""
    for split in splits:
        _check_empty_images(split, issues)
        if not _has_usable_objects(split):
            _report_no_objects(split, split is train, issues)
        if train is not None and split is not train:
            _compare_categories(train, split, issues)
    _check_unused(splits, issues)
    if train is None:
        return
    train_counts, val_counts = class_counts(train), class_counts(val) if val is not None else {}
    for category_id, name in train.categories.items():
        count, val_count = train_counts[category_id], val_counts.get(category_id, 0)
        if val is not None and val_count and not count:
            message = f"has {val_count} objects of class {name!r}, of which {train.file} has none"
            issues.add("class-only-in-val", val.file, "", message, split=val.name)
        if val is not None and count and not val_count:
            message = f"has {count} objects of class {name!r}, but the validation split has none"
            issues.add("class-not-in-val", train.file, "", message, split=train.name)
        if 0 < count < RARE:
            message = f"has {count} training object{'s' * (count > 1)} of class {name!r}"
            issues.add("class-rare", train.file, "", message, split=train.name)
    present = {category_id: count for category_id, count in train_counts.items() if count}
    if present and max(present.values()) > IMBALANCE * min(present.values()):
        most, least = max(present, key=present.__getitem__), min(present, key=present.__getitem__)
        message = (
            f"has {present[most]} objects of {train.categories[most]!r}, but {present[least]} of "
            f"{train.categories[least]!r}, a ratio of {present[most] / present[least]:.0f}"
        )
        issues.add("class-imbalance", train.file, "", message, _repeat_hint(train), split=train.name)


def _repeat_hint(split: Split) -> str:
    """Return how to train with more images of rare classes; "" if images with them are about as common as others."""
    objects = np.stack([split.image_indices, split.category_ids])[:, ~split.crowds]
    _, counts = np.unique(np.unique(objects, axis=1)[1], return_counts=True)  # images with each class
    ratio = counts.max() / counts.min()
    if ratio < MIN_REPEAT**4:  # the factor of the rarest class is its fourth root
        return ""
    threshold = (counts.max() * counts.min()) ** 0.5 / len(split.images)
    return f"label more of the rare class, or show its images more often: train with --repeat-threshold {threshold:.1g}"


def _check_unused(splits: Sequence[Split], issues: Issues) -> None:
    used = {category_id for split in splits for category_id, count in class_counts(split).items() if count}
    for split in splits:
        for category_id, name in split.categories.items():
            if category_id not in used:
                used.add(category_id)  # one issue for all splits
                message = f"lists the class {name!r} (id {category_id}), which has no objects"
                issues.add("class-unused", split.file, "", message, split=split.name)


def _has_usable_objects(split: Split) -> bool:
    """Return whether any object has an area in its image, perhaps after a conversion of its unit."""
    boxes, limits = split.boxes[~split.crowds], object_limits(split)[~split.crowds]
    return bool(clip_boxes(boxes, limits)[1].any() or wrong_unit(boxes, limits))


def _report_no_objects(split: Split, is_train: bool, issues: Issues) -> None:
    code, message, hint = "no-training-objects", "has no objects to train on", "label its images"
    if not is_train:
        code, message = "no-objects", "has no objects to evaluate on"
    elif not split.crowds.all():
        message, hint = "has no box with an area inside its image, so nothing to train on", "correct the boxes"
    elif split.source.format == "yolo":
        hint += " (one row per object in labels/…/NAME.txt for images/…/NAME.jpg)"
    issues.add(code, split.file, "", message, hint, split=split.name)


def _check_empty_images(split: Split, issues: Issues) -> None:
    with_objects = set(split.image_indices.tolist())
    for index, record in enumerate(split.images):
        if index not in with_objects and not record.broken and not record.missing:
            message = f"({record.name!r}) has no objects"
            location = split.locate_image(record)
            issues.add("image-empty", split.file, f"images[{record.position}]", message, **location)


def _compare_categories(train: Split, split: Split, issues: Issues) -> None:
    counts = class_counts(split)
    for category_id, name in sorted(split.categories.items()):
        train_name = train.categories.get(category_id)
        if train_name is None and counts[category_id]:
            count = counts[category_id]
            message = f"has {count} objects of class {name!r} (id {category_id}), which {train.file} does not list"
            issues.add("class-not-in-train", split.file, "", message, split=split.name)
        elif train_name not in (None, name):
            message = f"calls id {category_id} {name!r}, but {train.file} {train_name!r}"
            issues.add("category-renamed", split.file, "", message, split=split.name)
