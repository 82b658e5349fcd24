"""`deformable-detr split`."""

import sys
from pathlib import Path

from .options import DataOverrides, Dataset


def split(
    data: Dataset,
    *,
    out: Path,
    val: float = 0.2,
    test: float = 0.0,
    group_by: str | None = None,
    seed: int = 0,
    set_: DataOverrides = None,
) -> None:
    """Copy a dataset without a validation split and add one. The copy is repaired as by check --fix.

    Args:
        out: Empty folder for the copy; the dataset itself is not changed.
        val: Fraction of the images for validation, 0 to 1.
        test: Fraction of the images for a test split, 0 to 1.
        group_by: Regular expression. Images whose names match it with the same text stay in one split, for example
            '^[^_]+' for frames named VIDEO_0001.jpg.
        seed: Random seed.
    """
    from ..config.resolve import resolve_config
    from ..data.split import SplitOptions
    from .dataset_copy import split_dataset

    if not split_dataset(data, out, resolve_config(overrides=set_ or ()), SplitOptions(val, test, seed, group_by)):
        sys.exit(2)
