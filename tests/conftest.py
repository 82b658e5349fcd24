"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # for subprocesses

from tests.support.browser import browse, open_page  # noqa: E402, F401


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real datasets and weights; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("DEFORMABLE_DETR_SHARED") or ROOT.parent / "shared")
    if not (folder / "data").is_dir():
        pytest.skip(f"no real datasets at {folder} (set DEFORMABLE_DETR_SHARED)")
    return folder
