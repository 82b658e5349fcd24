"""What the tests share."""

import os
from pathlib import Path

import pytest

from browser import browse  # noqa: F401


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets and weights that some tests need; they skip where it is absent."""
    folder = Path(os.environ.get("DEFORMABLE_DETR_SHARED") or Path(__file__).parents[2] / "shared")
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data sets at {folder} (set DEFORMABLE_DETR_SHARED)")
    return folder
