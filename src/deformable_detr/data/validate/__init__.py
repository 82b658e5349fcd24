"""What is wrong with a data set, before a training finds out: every finding named by file and record.

>>> report = check_dataset("sets/cards", DataConfig(), image_size=480, long_side=800)  # doctest: +SKIP
>>> print(*report.lines(), sep="\\n")  # doctest: +SKIP
warning leak: train/a.jpg: (of train, images[0]) holds the same bytes as valid/b.jpg …; remove it from the training set
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...config.schema import DataConfig
from ...structures import Category
from ...utils.errors import UserError
from ..formats import find_source
from ..problems import split_command_hint
from ..source import AnnotationCache, Source, distinct_val_hint, same_split
from .annotations import Split, read_split
from .boxes import check_boxes
from .classes import check_classes, class_counts
from .images import Coverage, Depth, check_pictures
from .issues import KINDS, SEVERITIES, Findings, Issue

__all__ = [
    "KINDS",
    "Coverage",
    "Depth",
    "Findings",
    "Issue",
    "Report",
    "Split",
    "check_dataset",
    "check_for_training",
]

SHOWN = 5  # lines of one kind on the terminal


@dataclass(frozen=True)
class Report:
    """What `check_dataset` found in which splits; image_size is the one that tiny objects were judged for."""

    root: Path
    splits: tuple[Split, ...]
    findings: Findings
    coverage: Coverage
    image_size: int

    @property
    def errors(self) -> list[Issue]:
        return self.findings.of("error")

    def lines(self, shown: int = SHOWN, without: Sequence[str] = ()) -> Iterator[str]:
        """Errors and warnings, a line each, `shown` of a kind, and then how many more; none of the kinds `without`."""
        for code, group in self.findings.by_code().items():
            if (severity := KINDS[code].severity) == "note" or code in without:
                continue
            for finding in group[:shown]:
                yield f"{severity} {code}: {finding.line}"
            if len(group) > shown:
                yield f"{severity} {code}: {len(group) - shown} more"

    @property
    def summary(self) -> str:
        """One line: how much was looked at, and how much found."""
        facts = [f"{split.name} {len(split.pictures)} images, {len(split.positions)} objects" for split in self.splits]
        counts = [_count(len(self.findings.of(severity)), severity) for severity in SEVERITIES]
        seen = self.coverage
        whole = "" if seen.decoded == seen.images else f" ({seen.decoded} of {seen.images} images decoded)"
        return f"{'; '.join(facts) or self.root}{whole}: {', '.join(counts)}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        splits = {
            split.name: {
                "file": str(split.file),
                "format": split.source.format,
                "images": len(split.pictures),
                "objects": len(split.positions),
                "classes": {split.categories[number]: count for number, count in class_counts(split).items()},
            }
            for split in self.splits
        }
        return {
            "data": str(self.root),
            "image_size": self.image_size,
            "splits": splits,
            "looked_at": vars(self.coverage),
            "counts": {severity: len(self.findings.of(severity)) for severity in SEVERITIES},
            "kinds": {code: len(group) for code, group in self.findings.by_code().items()},
            "findings": [finding.to_dict() for group in self.findings.by_code().values() for finding in group],
        }


def check_dataset(
    root: str | os.PathLike[str],
    data: DataConfig,
    image_size: int,
    long_side: int,
    depth: Depth = "full",
    progress: bool = False,
    cache: AnnotationCache | None = None,
) -> Report:
    """Looks at the training, the validation and, where there is one, the test split of the set at `root`.

    image_size, long_side: the model's, in pixels; objects that are tiny after the resize are told.
    depth: 'full' decodes every image; 'auto' stops where `pictures.AUTO_IMAGES` and `AUTO_SECONDS` say.

    Raises `UserError` where there is no set at all; all that is wrong with one is a finding.
    """
    base = Path(root).expanduser()
    found = Findings()
    cache = cache or AnnotationCache()
    sources = find_splits(base, data, found)
    splits: list[Split] = []
    categories: tuple[Category, ...] | None = None
    for name, source in sources.items():
        if (split := read_split(source, name, categories, found, cache)) is None:
            continue
        if name == data.train_split:
            categories = tuple(Category(number, split.categories[number]) for number in sorted(split.categories))
        splits.append(split)
    coverage = check_pictures(splits, depth, found, progress)
    for split in splits:
        check_boxes(split, image_size, long_side, found)
    by_name = {split.name: split for split in splits}
    check_classes(splits, by_name.get(data.train_split), by_name.get(data.val_split), found)
    return Report(base, tuple(splits), found, coverage, image_size)


def check_for_training(
    root: str | os.PathLike[str],
    data: DataConfig,
    image_size: int,
    long_side: int,
    cache: AnnotationCache | None = None,
) -> tuple[str, ...]:
    """The lines that a training says about its set before it begins, the warnings in brief; `data.check` says how deep.

    What is wrong within a test split, which training does not use, is left to `check`.

    Raises `UserError` of one line, which names the first error, where there are any.
    """
    if data.check == "off":
        return ()
    report = check_dataset(root, data, image_size, long_side, depth=data.check, cache=cache)
    used = [finding for finding in report.findings if finding.split in (data.train_split, data.val_split)]
    report = replace(report, findings=Findings(used))
    if errors := report.errors:
        first = next(iter(report.findings.by_code().values()))[0]
        more = f" (the first of {len(errors)} errors; all: deformable-detr check {root})" if len(errors) > 1 else ""
        raise UserError(f"{first.line}{more}")
    lines = list(report.lines(shown=1))
    return (*lines, f"all about the data: deformable-detr check {root}") if lines else ()


def refused(report: Report, data: DataConfig) -> None:
    """Opens the splits as training would, and adds what is refused: no error must be left for it to find."""
    from ..dataset import open_dataset

    categories: Sequence[Category] | None = None
    for split in report.splits:
        try:
            opened = open_dataset(report.root, split.name, data, categories)
        except UserError as error:
            what, _, mend = str(error).removeprefix(f"{split.file}: ").rpartition("; ")
            report.findings.add("set-refused", split.file, "", what or mend, mend if what else "", split=split.name)
            continue
        if split.name == data.train_split:
            categories = opened.categories


def find_splits(root: Path, data: DataConfig, found: Findings) -> dict[str, Source]:
    """The splits that there are; of a set of one file or folder, that one. What is wrong with them is a finding."""
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
    said: set[str] = set()  # what is wrong with a data.yaml is wrong for every split
    for name in (data.train_split, data.val_split):
        if name in failures and str(failures[name]) not in said:
            said.add(str(failures[name]))
            what, _, mend = str(failures[name]).removeprefix(f"{root}: ").partition("; ")
            if data.train_split in sources:
                other = (
                    "take the test split with --set data.val_split=test"
                    if "test" in sources
                    else split_command_hint(root)
                )
                mend += f"; or {other}"
            found.add("split-missing", root, "", what, mend, split=name)
    train, val = sources.get(data.train_split), sources.get(data.val_split)
    if train is not None and val is not None and same_split(train, val):
        found.add("splits-same", train.file, "", "would be both the training and the validation split",
                  distinct_val_hint(val, root), split=data.val_split)  # fmt: skip
        del sources[data.val_split]
    return sources


def _is_test(sources: dict[str, Source], train: str, root: Path) -> bool:
    """Whether there is a test split that says so, or nothing else; files that name no split serve for any."""
    test, first = sources.get("test"), sources.get(train)
    if test is None or (first is not None and same_split(first, test)):
        return False
    own = root.parent if root.is_file() else root
    return len(sources) == 1 or test.file.parent != own or "test" in test.file.name.lower()


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
