"""`deformable-detr check`."""

import sys
from pathlib import Path
from typing import Any

from .options import Dataset, JsonFile, Overrides, config_options


@config_options("model.image_size", "data.tile")
def check(
    data: Dataset,
    *,
    fix: Path | None = None,
    report: Path | None = None,
    set_: Overrides = None,
    json: JsonFile = None,
    settings: dict[str, Any],
) -> None:
    """Find the errors of a dataset. The exit code is 2 if training would fail or the test split is unusable.

    Args:
        fix: Empty folder for a repaired copy; the dataset itself is not changed.
        report: HTML file with the issues and images.
    """
    from ..config.resolve import resolve_config
    from .dataset_copy import check_dataset

    if not check_dataset(data, resolve_config(overrides=set_ or (), options=settings), fix, report, json):
        sys.exit(2)
