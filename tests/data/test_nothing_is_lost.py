"""Datasets with renamed, nested, re-encoded and removed files: every object is read or counted as left out."""

import shutil
import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from deformable_detr.utils.errors import UserError
from tests.support.data_problems import check_report
from tests.support.label_formats import OBJECTS, WRITERS, write_task

LABEL_SUFFIXES = {".txt", ".xml"}  # of formats with one label file per image


def move(path, name):
    target = path.parent / name
    target.parent.mkdir(exist_ok=True)
    path.rename(target)


def encode(path, suffix):
    with Image.open(path) as image:
        image.convert("RGB").save(path.with_suffix(suffix))
    path.unlink()


RENAMES = {
    "capitals": lambda path: move(path, path.stem.upper() + path.suffix),
    "suffix in capitals": lambda path: move(path, path.stem + path.suffix.upper()),
    "hash": lambda path: move(path, f"3fa81c02-{path.name}"),
    "hash at the end": lambda path: move(path, f"{path.stem}_7f3c9e{path.suffix}"),
    "accents": lambda path: move(path, unicodedata.normalize("NFD", path.name)),
    "sub-folder": lambda path: move(path, f"day 1/{path.name}"),
    "other name": lambda path: move(path, f"other{path.stem[::-1]}{path.suffix}"),
}
IMAGE_CHANGES = RENAMES | {
    "bmp": lambda path: encode(path, ".bmp"),
    "webp": lambda path: encode(path, ".webp"),
    "heic": lambda path: move(path, f"{path.stem}.heic"),
    "removed": lambda path: path.unlink(),
    "damaged": lambda path: path.write_bytes(b"\xff\xd8 no image"),
}


def change_some(data, paths, changes, label):
    for path in paths:
        change = data.draw(st.sampled_from([None, None, *changes]), label=f"{label} {path.name}")
        if change is not None:
            changes[change](path)


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_object_is_read_or_counted(name, data):
    folder = Path(tempfile.mkdtemp())
    try:
        root = write_task(folder / "set", WRITERS[name])
        files = [path for path in sorted(root.rglob("*")) if path.is_file()]
        images = [path for path in files if path.suffix in (".jpg", ".png")]
        labels = [path for path in files if path.suffix in LABEL_SUFFIXES and path.stem in {i.stem for i in images}]
        change_some(data, images, IMAGE_CHANGES, "image")
        change_some(data, labels, RENAMES, "label")
        try:
            report = check_report(root)
        except UserError:
            return  # the dataset as a whole was refused
        if any(issue.code in ("split-missing", "file-unreadable") for issue in report.errors):
            return
        read = sum(len(split.positions) for split in report.splits)
        assert read + report.left_out == OBJECTS, report.summary
        if read < OBJECTS:
            assert report.issues.of("error") or report.issues.of("warning")
    finally:
        shutil.rmtree(folder)
