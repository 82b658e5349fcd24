"""What a reader reports, and the rules that all formats share."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from ..structures import Category
from ..utils.errors import UserError
from ..utils.files import checksum


class OnProblem(Protocol):
    """What a reader calls for a record that it cannot use; where it returns, the record is left out."""

    def __call__(self, code: str, file: Path, record: str, what: str, mend: str) -> object:
        """code: the kind, as in `check.codes`; record: its place in the file, or '' for the whole file."""
        ...


def refuse(code: str, file: Path, record: str, what: str, mend: str) -> NoReturn:
    """The complaint that ends the reading: a `UserError` of one line."""
    raise UserError(f"{file}: {record}{' ' if record else ''}{what}; {mend}")


def ignore(code: str, file: Path, record: str, what: str, mend: str) -> None:
    """The complaint that leaves the record out, for readers who are not the ones to tell."""


class Source(Protocol):
    """One split of a data set.

    file: what stands for the split in messages; no two splits have the same.
    format: 'coco', 'yolo' or 'voc'.
    """

    @property
    def file(self) -> Path: ...

    @property
    def format(self) -> str: ...

    def read(self, categories: Sequence[Category] | None = None, complain: OnProblem = refuse) -> dict[str, Any]:
        """The COCO dict. Formats without ids of their own take those of `categories` by name."""
        ...

    def image_folder(self, names: Sequence[str]) -> Path:
        """The folder to which the file names of the images are relative; `UserError` where an image is missing."""
        ...


def same_split(one: Source, other: Source) -> bool:
    """Whether two splits of a set are one."""
    return os.path.realpath(one.file) == os.path.realpath(other.file)


def other_split(source: Source, root: Path | str) -> str:
    """What to do where a split is the training split too."""
    if source.format == "yolo":
        return f"{dividing(root)}, or name another folder under val in data.yaml"
    return f"{dividing(root)}, or give data.val_images and data.val_annotations"


def dividing(root: Path | str) -> str:
    """The command that makes a validation split."""
    return f"divide it with deformable-detr split {shlex.quote(str(root))} --out NEW"


def content_hash(source: Source, categories: Sequence[Category] | None = None) -> str:
    """Tells one split's annotations from another's, wherever its folder lies: SHA-256 in hexadecimal."""
    if source.format == "coco":
        return checksum(source.file)
    content = source.read(categories)
    content["annotations"] = [{k: v for k, v in a.items() if k != "where"} for a in content["annotations"]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def ids_by_name(names: Sequence[str], categories: Sequence[Category] | None, first: int) -> list[int]:
    """An id for each name: that of the category called so, a fresh one for others; `first`, … where none are given."""
    if categories is None:
        return list(range(first, first + len(names)))
    known = {category.name: category.id for category in categories}
    fresh = max((category.id for category in categories), default=0)
    ids = []
    for name in names:
        if name not in known:
            fresh += 1
        ids.append(known.get(name, fresh))
    return ids


def renumbered(own: Sequence[Category], wanted: Sequence[Category], used: Container[int]) -> dict[int, int]:
    """Ids in `own` → those in `wanted`, where both list the same names under other ids; {} where ids decide.

    The one rule for categories that two files, or a file and a model, list differently: names decide where each is
    there once in either list and `wanted` has all of `own` that are `used`, by objects. With an unknown name, it may be
    the name that is the slip. What is neither used nor wanted gets no id.
    """
    ids = {category.name: category.id for category in wanted}
    names = {category.name for category in own}
    unknown = any(category.name not in ids and category.id in used for category in own)
    if len(ids) < len(wanted) or len(names) < len(own) or unknown:
        return {}
    moved = {category.id: ids[category.name] for category in own if category.name in ids}
    return moved if any(number != other for number, other in moved.items()) else {}
