"""The work of `check` and `split`: print issues, write reports and repaired copies."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from ..config.schema import Config, DataConfig
from ..data.source import AnnotationCache
from ..data.split import SPLIT_ISSUES, SplitOptions, ensure_splittable
from ..data.split import split_dataset as split_images
from ..data.validate import Report, check_opening
from ..data.validate import check_dataset as validate
from ..data.validate.repair import CHANGES, Change, new_copy, repair
from ..data.validate.report_page import render_report
from ..utils.errors import UserError
from ..utils.files import prepare_files, write_json, write_text
from ..utils.terminal import echo


def check_dataset(data: Path, config: Config, fix: Path | None, report: Path | None, json: Path | None) -> bool:
    """Print the issues of a dataset, and write a repaired copy and reports where asked for.

    Returns:
        Whether the dataset, or its repaired copy, has no errors.

    Raises:
        UserError: The dataset cannot be read at all, or an output cannot be written.
    """
    prepare_files({"--report": report, "--json": json})
    if fix is None:
        issues = _print_issues(data, config)
        _write_reports(issues, report, json)
        return not issues.errors
    fix = fix.expanduser()
    with new_copy(data, fix, "--fix"):
        issues = _print_issues(data, config)
        _write_reports(issues, report, json)
        changes = repair(issues, fix, progress=True)
    return _check_copy("repaired", issues, fix, changes, config)


def split_dataset(data: Path, out: Path, config: Config, options: SplitOptions) -> bool:
    """Write a repaired copy of a dataset with a validation split.

    Returns:
        Whether the copy has no errors.

    Raises:
        UserError: The dataset already has the split or too few images, or `out` cannot be written.
    """
    train, val = config.data.train_split, config.data.val_split
    if val == "test" and options.test:
        raise UserError(f"data.val_split=test --test {options.test:g}: both name the split 'test'; leave one out")
    out = out.expanduser()
    ensure_splittable(data.expanduser(), config.data, options)
    with new_copy(data, out, "--out"):
        issues = _print_issues(data, config, hidden=SPLIT_ISSUES)
        if train not in {split.name for split in issues.splits}:
            raise UserError(next(e.line for e in issues.errors if e.split == train and e.code == "file-unreadable"))
        changes = repair(issues, out, progress=True)
        images, groups = split_images(issues, out, config.data, options)
    if groups < images or options.group is not None:
        echo(f"{images} images in {groups} groups; no group is split")
    usable = _check_copy("split", issues, out, changes, config)
    if usable:
        names = {"train_split": train, "val_split": val}
        sets = [f" --set data.{key}={name}" for key, name in names.items() if name != getattr(DataConfig(), key)]
        echo(f"Next: deformable-detr train {shlex.quote(str(out))} --out runs/NAME{''.join(sets)}")
    return usable


def _validate(root: Path, data: DataConfig, config: Config) -> Report:
    model = config.model
    cache = AnnotationCache(masks=True)
    return validate(root, data, model.resize_rule, progress=True, cache=cache, num_queries=model.num_queries)


def _print_issues(data: Path, config: Config, hidden: Sequence[str] = ()) -> Report:
    """Validate a dataset and print its issues except those with `hidden` codes."""
    report = _validate(data, config.data, config)
    if not report.errors:
        check_opening(report, config.data)
    for line in report.lines(without=hidden):
        echo(line)
    if not hidden:
        echo(report.summary)
    return report


def _write_reports(issues: Report, report: Path | None, json: Path | None) -> None:
    if json is not None:
        write_json(json, issues.to_dict())
    if report is not None:
        write_text(report, render_report(issues))
        echo(f"report with images: {report}")


def _check_copy(kind: str, issues: Report, copy: Path, changes: list[Change], config: Config) -> bool:
    """Validate a copy and print what remains; return whether it has no errors."""
    data = config.data.replace(images=None, annotations=None, val_images=None, val_annotations=None)
    remaining = _validate(copy, data, config)
    (images, objects), (images_left, objects_left) = _counts(issues), _counts(remaining)
    echo(
        f"{copy}: {kind} copy with {images_left} of {images} images and {objects_left} of {objects} objects; "
        f"{copy / CHANGES} lists {len(changes)} changes"
    )
    for line in remaining.lines(limit=1):
        echo(f"remaining: {line}")
    echo(remaining.summary)
    return not remaining.errors


def _counts(report: Report) -> tuple[int, int]:
    """Return the number of images and of objects in the annotation files, valid or not."""
    contents = [split.content for split in report.splits]
    return sum(len(content["images"]) for content in contents), sum(len(content["annotations"]) for content in contents)
