"""`deformable-detr check`: what it prints and which files it writes."""

from __future__ import annotations

from pathlib import Path

from ...config import Config
from ...outputs import prepare_files, write_json, write_text
from . import Report, check_dataset, refused
from .fix import CHANGES, prepare_copy, repair
from .page import page


def run(data: Path, settings: Config, fix: Path | None, report: Path | None, json: Path | None) -> bool:
    """Checks, prints, and writes what is asked for; whether training could use the set, or its repaired copy.

    Raises `UserError` for a set or an output that cannot be used at all.
    """
    prepare_files({"--report": report, "--json": json})
    if fix is not None:
        prepare_copy(data, fix)
    model = settings.model
    found = check_dataset(data, settings.data, model.image_size, model.long_side, progress=True)
    if not found.errors:
        refused(found, settings.data)
    for line in found.lines():
        print(line)
    print(found.summary)
    if json is not None:
        write_json(json, found.to_dict())
    if report is not None:
        write_text(report, page(found))
        print(f"pictures of the suspects: {report}")
    if fix is None:
        return not found.errors

    changes = repair(found, fix)
    given = {"images": None, "annotations": None, "val_images": None, "val_annotations": None}
    again = check_dataset(fix, settings.data.replace(**given), model.image_size, model.long_side, progress=True)
    (images, objects), (images_left, objects_left) = _records(found), _records(again)
    print(f"{fix}: a repaired copy with {images_left} of {images} images and {objects_left} of {objects} objects; "
          f"{fix / CHANGES} lists {len(changes)} changes")  # fmt: skip
    for line in again.lines(shown=1):
        print(f"still {line}")
    print(again.summary)
    return not again.errors


def _records(report: Report) -> tuple[int, int]:
    """Images and objects that the files of a set list, good or not."""
    contents = [split.content for split in report.splits]
    return sum(len(content["images"]) for content in contents), sum(len(content["annotations"]) for content in contents)
