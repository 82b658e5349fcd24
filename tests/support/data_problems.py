"""What a fault in a set must lead to, in `check` and before training alike."""

import pytest

from deformable_detr.config.schema import DataConfig
from deformable_detr.data.dataset import ensure_distinct_splits, open_dataset
from deformable_detr.data.validate import KINDS, check_dataset, check_for_training
from deformable_detr.utils.errors import UserError

SIZES = {"image_size": 64, "long_side": 107}
USUAL = {"class-rare", "image-empty"}  # of the small sets that tests make


def found(root, depth="full", **data):
    return check_dataset(root, DataConfig(**data), **SIZES, depth=depth)


def codes(root, **data):
    return {finding.code for finding in found(root, **data).findings} - USUAL


def as_training(root, check="full", **data):
    """What training does with its data before and while it learns."""
    config = DataConfig(check=check, **data)
    lines = check_for_training(root, config, **SIZES)
    train = open_dataset(root, config.train_split, config)
    val = open_dataset(root, config.val_split, config, categories=train.categories)
    ensure_distinct_splits(train, val, root)
    for split in (train, val):
        assert len(list(split)) == len(split)
        assert split.ground_truth
    return lines


def assert_as_documented(root, expected, name="", **data):
    """Just these kinds are found; training refuses, in one line with `name`, where one is an error. Returns the line.

    The findings are one line each, and name a file that is there or the one that is missing.
    """
    report = found(root, **data)
    kinds = {finding.code for finding in report.findings} - USUAL
    assert kinds == set(expected), f"{sorted(kinds)} instead of {sorted(expected)}"
    for finding in report.findings:
        assert "\n" not in finding.line
        assert len(finding.line) < 1000
    errors = [code for code in expected if KINDS[code].severity == "error"]
    if not errors:
        lines = as_training(root, **data)
        text = " ".join(lines)
        assert all(code in text for code in expected if KINDS[code].severity == "warning"), text
        return text
    with pytest.raises(UserError) as caught:
        as_training(root, **data)
    message = str(caught.value)
    assert name in message, message
    assert "\n" not in message
    return message
