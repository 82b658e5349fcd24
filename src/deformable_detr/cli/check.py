"""`deformable-detr check` and `split`: what they print and which files they write."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ..config.schema import Config, DataConfig
from ..data.split import SPLIT_ISSUES, SplitOptions, ensure_splittable, split_dataset
from ..data.validate import Report, check_dataset, check_opening
from ..data.validate.repair import CHANGES, Change, new_copy, repair
from ..data.validate.report_page import render_report
from ..utils.errors import UserError
from ..utils.files import prepare_files, write_json, write_text


def run(data: Path, settings: Config, fix: Path | None, report: Path | None, json: Path | None) -> bool:
    """Checks, prints, and writes what is asked for; whether training could use the set, or its repaired copy.

    Raises `UserError` for a set or an output that cannot be used at all.
    """
    prepare_files({"--report": report, "--json": json})
    if fix is None:
        found = _checked(data, settings)
        _write(found, report, json)
        return not found.errors
    fix = fix.expanduser()
    with new_copy(data, fix, "--fix"):
        found = _checked(data, settings)
        _write(found, report, json)
        changes = repair(found, fix)
    return _copied("repaired", found, fix, changes, settings)


def split(data: Path, out: Path, settings: Config, options: SplitOptions) -> bool:
    """Writes a repaired copy with a validation split, and prints; whether training could use it.

    Raises `UserError` for a set that has one, or too few images, and for an output that cannot be used.
    """
    train, val = settings.data.train_split, settings.data.val_split
    if val == "test" and options.test:
        raise UserError(f"data.val_split=test --test {options.test:g}: both would be 'test'; leave one out")
    out = out.expanduser()
    ensure_splittable(data.expanduser(), settings.data, options)
    with new_copy(data, out, "--out"):
        found = _checked(data, settings, without=SPLIT_ISSUES)
        if train not in {one.name for one in found.splits}:
            raise UserError(next(f.line for f in found.errors if f.split == train and f.code == "file-unreadable"))
        changes = repair(found, out)
        images, groups = split_dataset(found, out, settings.data, options)
    if groups < images or options.group is not None:
        print(f"{images} images in {groups} groups that stay together")
    good = _copied("divided", found, out, changes, settings)
    if good:
        own = [f" --set data.{key}={value}" for key, value in (("train_split", train), ("val_split", val))
               if value != getattr(DataConfig(), key)]  # fmt: skip
        print(f"next: deformable-detr train {shlex.quote(str(out))} --out runs/NAME{''.join(own)}")
    return good


def _checked(data: Path, settings: Config, without: Sequence[str] = ()) -> Report:
    """What was found, printed; without: kinds of which nothing is said."""
    model = settings.model
    found = check_dataset(data, settings.data, model.image_size, model.long_side, progress=True)
    if not found.errors:
        check_opening(found, settings.data)
    for line in found.lines(without=without):
        print(line)
    if not without:
        print(found.summary)
    return found


def _write(found: Report, report: Path | None, json: Path | None) -> None:
    if json is not None:
        write_json(json, found.to_dict())
    if report is not None:
        write_text(report, render_report(found))
        print(f"pictures of the suspects: {report}")


def _copied(what: str, found: Report, copy: Path, changes: list[Change], settings: Config) -> bool:
    """Checks a copy and says what is left in it; whether training could use it."""
    model = settings.model
    given = {"images": None, "annotations": None, "val_images": None, "val_annotations": None}
    again = check_dataset(copy, settings.data.replace(**given), model.image_size, model.long_side, progress=True)
    (images, objects), (images_left, objects_left) = _records(found), _records(again)
    print(f"{copy}: a {what} copy with {images_left} of {images} images and {objects_left} of {objects} objects; "
          f"{copy / CHANGES} lists {len(changes)} changes")  # fmt: skip
    for line in again.lines(limit=1):
        print(f"still {line}")
    print(again.summary)
    return not again.errors


def _records(report: Report) -> tuple[int, int]:
    """Images and objects that the files of a set list, good or not."""
    contents = [split.content for split in report.splits]
    return sum(len(content["images"]) for content in contents), sum(len(content["annotations"]) for content in contents)
