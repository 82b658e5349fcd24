"""Check a dataset before training: every issue names the file and record and suggests a fix."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...config.image_size import ModelResize
from ...config.schema import DataConfig
from ...structures import Category
from ...utils.errors import UserError
from ...utils.progress import stage_bar
from ..formats import find_source
from ..issues import ISSUE_TYPES, SEVERITIES, Issue, Issues
from ..source import AnnotationCache, Source, distinct_val_hint, same_split, split_command_hint
from .annotations import Split, read_split
from .boxes import check_boxes, check_crowded
from .classes import check_classes, class_counts
from .images import Coverage, Depth, check_images
from .masks import check_masks, count_masks
from .outside import check_outside

LINES_PER_TYPE = 5  # on the terminal


@dataclass(frozen=True)
class Report:
    """The result of `check_dataset`; `image_size` decides which objects are tiny."""

    root: Path
    splits: tuple[Split, ...]
    issues: Issues
    coverage: Coverage
    image_size: int

    @property
    def errors(self) -> list[Issue]:
        return self.issues.of("error")

    def lines(self, limit: int = LINES_PER_TYPE, without: Sequence[str] = ()) -> Iterator[str]:
        """Yield errors and warnings, `limit` lines per type and the number of others, but no types in `without`."""
        for code, group in self.issues.by_code().items():
            if (severity := ISSUE_TYPES[code].severity) == "note" or code in without:
                continue
            for issue in group[:limit]:
                yield f"{severity} {code}: {issue.line}"
            if len(group) > limit:
                yield f"{severity} {code}: {len(group) - limit} more"

    @property
    def left_out(self) -> int:
        """Number of objects in the files that no split counts, because their records cannot be read."""
        counts = {(issue.code, issue.file, issue.record): issue.objects for issue in self.issues}  # once per file
        return sum(counts.values())

    @property
    def summary(self) -> str:
        """One line with the numbers of images, objects and issues."""
        sizes = [f"{s.name} {len(s.images)} images, {len(s.positions)} objects" for s in self.splits]
        totals = {severity: len(self.issues.of(severity)) for severity in SEVERITIES}
        counts = [f"{total} {severity}{'s' * (total != 1)}" for severity, total in totals.items()]
        decoded, images = self.coverage.decoded, self.coverage.images
        partial = "" if decoded == images else f" ({decoded} of {images} images decoded)"
        lost = f"; {self.left_out} objects left out" if self.left_out else ""
        return f"{'; '.join(sizes) or self.root}{lost}{partial}: {', '.join(counts)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the whole report as a dict for JSON."""
        splits = {
            split.name: {
                "file": str(split.file),
                "format": split.source.format,
                "images": len(split.images),
                "objects": len(split.positions),
                "masks": count_masks(split),
                "classes": {split.categories[number]: count for number, count in class_counts(split).items()},
            }
            for split in self.splits
        }
        groups = self.issues.by_code()
        return {
            "data": str(self.root),
            "image_size": self.image_size,
            "splits": splits,
            "coverage": vars(self.coverage),
            "counts": {severity: len(self.issues.of(severity)) for severity in SEVERITIES},
            "types": {code: len(group) for code, group in groups.items()},
            "issues": [issue.to_dict() for group in groups.values() for issue in group],
        }


def check_dataset(
    root: str | os.PathLike[str],
    data: DataConfig,
    rule: ModelResize,
    depth: Depth = "full",
    progress: bool = False,
    cache: AnnotationCache | None = None,
    num_queries: int | None = None,
) -> Report:
    """Check the training, validation and, if there is one, test split of a dataset.

    Args:
        root: Folder or annotation file of the dataset.
        data: Data settings; with tiles, objects are measured in them.
        rule: Resize of the model; it decides which objects are tiny.
        depth: "full" decodes every image; "auto" decodes at most `AUTO_IMAGES` in `AUTO_SECONDS`.
        progress: Show the progress.
        cache: Keeps the parsed annotations for other readers; decides whether masks are checked. Default: no masks.
        num_queries: Queries of the model, the most objects per image that it can find. If omitted, not checked.

    Raises:
        UserError: There is no dataset. Everything that is wrong in a dataset becomes an issue.
    """
    base, issues, cache = Path(root).expanduser(), Issues(), cache or AnnotationCache()
    splits: dict[str, Split] = {}
    with stage_bar("check", 3, progress) as bar:
        bar.stage("read the annotations")
        for name, source in find_splits(base, data, issues).items():
            categories = splits[data.train_split].category_list if data.train_split in splits else None
            if (split := read_split(source, name, categories, issues, cache)) is not None:
                splits[name] = split
        bar.stage("read the images")
        coverage = check_images(list(splits.values()), depth, issues, progress)
        bar.stage("check the objects and classes")
        for split in splits.values():
            check_boxes(split, rule, issues, data.tile, train=split.name == data.train_split)
            check_crowded(split, num_queries, issues, data.tile)
            check_masks(split, issues)
        check_outside(base, list(splits.values()), data, issues)
        check_classes(list(splits.values()), splits.get(data.train_split), splits.get(data.val_split), issues)
    return Report(base, tuple(splits.values()), issues, coverage, rule.short)


def check_for_training(
    root: str | os.PathLike[str],
    data: DataConfig,
    rule: ModelResize,
    cache: AnnotationCache | None = None,
    num_queries: int | None = None,
) -> tuple[str, ...]:
    """Check a dataset as deep as `data.check` says, and return the lines that training prints: one per type of warning.

    Training does not use the test split, so its issues are ignored. Raises UserError with the first error, if any.
    """
    if data.check == "off":
        return ()
    report = check_dataset(root, data, rule, data.check, progress=True, cache=cache, num_queries=num_queries)
    used = [issue for issue in report.issues if issue.split in (data.train_split, data.val_split)]
    report = replace(report, issues=Issues(used))
    if errors := report.errors:
        first = next(iter(report.issues.by_code().values()))[0]
        more = f" (the first of {len(errors)} errors; to list all: deformable-detr check {root})"
        raise UserError(f"{first.line}{more if len(errors) > 1 else ''}")
    lines = list(report.lines(limit=1))
    return (*lines, f"to list all issues: deformable-detr check {root}") if lines else ()


def check_opening(report: Report, data: DataConfig) -> None:
    """Open the splits as training would, and add an issue for each error that the checks missed."""
    from ..dataset import open_dataset

    categories: Sequence[Category] | None = None
    for split in report.splits:
        try:
            dataset = open_dataset(report.root, split.name, data, categories)
            if split.name == data.train_split:
                categories = dataset.categories
        except UserError as error:
            report.issues.append(Issue.from_error("dataset-rejected", split.file, error, split=split.name))


def find_splits(root: Path, data: DataConfig, issues: Issues) -> dict[str, Source]:
    """Return the splits of a dataset, and add issues for missing ones. Raises UserError if there is no dataset."""
    if not root.exists():
        raise UserError(f"{root}: no such dataset; give its folder or its annotation file")
    sources: dict[str, Source] = {}
    failures: dict[str, UserError] = {}
    for name in dict.fromkeys((data.train_split, data.val_split, "test")):
        try:
            sources[name] = find_source(root, name, data)
        except UserError as error:
            failures[name] = error
    if "test" not in (data.train_split, data.val_split) and not _is_test(sources, data.train_split, root):
        sources.pop("test", None)
    # Both splits can fail for the same reason.
    reasons = {str(failures[name]): name for name in (data.val_split, data.train_split) if name in failures}
    for reason, name in reversed(reasons.items()):
        message, _, hint = reason.removeprefix(f"{root}: ").partition("; ")
        if data.train_split in sources:
            use_test = "use the test split with --set data.val_split=test"
            hint += f"; or {use_test if 'test' in sources else split_command_hint(root)}"
        issues.add("split-missing", root, "", message, hint, split=name)
    train, val = sources.get(data.train_split), sources.get(data.val_split)
    if train is not None and val is not None and same_split(train, val):
        message = "would be both the training and the validation split"
        issues.add("splits-same", train.file, "", message, distinct_val_hint(val, root), split=data.val_split)
        del sources[data.val_split]
    return sources


def _is_test(sources: dict[str, Source], train: str, root: Path) -> bool:
    """Return whether the test split is named so, or the only one; files without a split name match every split."""
    test, first = sources.get("test"), sources.get(train)
    if test is None or (first is not None and same_split(first, test)):
        return False
    folder = root.parent if root.is_file() else root
    return test.is_named("test", folder) or (test.format == "yolo" and test.file != folder) or len(sources) == 1
