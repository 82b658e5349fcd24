"""A split as it lies on disk, in whichever format: where its records are and how they become one COCO dict."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from ..config import DataConfig
from ..errors import UserError
from ..structures import Category
from ..weights.files import checksum
from .coco_json import is_other_json, read_json
from .layouts import (
    ROBOFLOW,
    find_annotations,
    find_images,
    given_annotations,
    names_other_split,
    refuse_unreadable,
    split_aliases,
)


class Complain(Protocol):
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

    def read(self, categories: Sequence[Category] | None = None, complain: Complain = refuse) -> dict[str, Any]:
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


@dataclass(frozen=True)
class CocoSource:
    """A COCO JSON file, its images in `folder` or where `layouts.find_images` finds them."""

    file: Path
    root: Path
    split: str
    data: DataConfig
    format: str = "coco"

    def read(self, categories: Sequence[Category] | None = None, complain: Complain = refuse) -> dict[str, Any]:
        return read_json(self.file)

    def image_folder(self, names: Sequence[str]) -> Path:
        return find_images(self.file, self.root, self.split, self.data, names)


def find_source(root: Path, split: str, data: DataConfig) -> Source:
    """One split of the set at `root`: COCO JSON, else YOLO (`data.yaml`), else Pascal VOC (XML files).

    Raises `UserError` where there is no such split.
    """
    from .voc import find_voc
    from .yolo import find_listed, find_yaml, find_yolo

    refuse_unreadable(root)
    if root.is_file() and (yaml := find_yaml(root)):
        return find_yolo(yaml, split)
    failure: UserError | None = None
    try:
        file = find_annotations(root, split, data)
        # A folder's only JSON file may be anything where the set is plainly in another format.
        certain = given_annotations(split, data) or file == root or file.name == ROBOFLOW
        if certain or file.stem.startswith("instances_"):
            return CocoSource(file, root, split, data)
    except UserError as error:
        if given_annotations(split, data) or not root.is_dir():
            raise
        file, failure = root, error
    if (yaml := find_yaml(root)) is not None:
        return find_yolo(yaml, split)
    if (voc := find_voc(root, split, (data.train_split, data.val_split, "test"))) is not None:
        return voc
    if (listed := find_listed(root, split)) is not None:
        return listed
    if failure is None and is_other_json(file):
        failure = UserError(f"{root}: no '{split}' split; {file.name} has no list 'images'; give COCO JSON")
    if failure is not None:
        raise _nearly_a_set(root, split) or failure
    return CocoSource(file, root, split, data)


def _nearly_a_set(root: Path, split: str) -> UserError | None:
    """What is missing where a folder has YOLO's or VOC's files, but not their layout."""
    from .yolo import CLASSES

    if names_other_split(root / "x", split):
        return UserError(
            f"{root}: no '{split}' split; its name says that it is another one; give the folder that holds both, or "
            "rename it"
        )
    if classes := next((name for name in CLASSES if (root / name).is_file()), None):
        places = " or ".join(str(root / place) for place in (f"images/{split}", f"{split}/images"))
        return UserError(f"{root}: no '{split}' split; {classes} is there, but no images in {places}; put them there")
    folders = [root, *(root / name for name in split_aliases(split))]
    for folder in (folder / "labels" for folder in folders):
        if any(folder.rglob("*.txt")):
            return UserError(
                f"{root}: no '{split}' split; {folder} has YOLO's label files, but data.yaml is missing; write one in "
                f"{root} with 'train' and 'val', a folder or a list of images each, and 'names', the classes, or list "
                f"the classes in classes.txt, a name a line"
            )
    for folder in (folder / name for folder in folders for name in ("annotations", "Annotations")):
        if any(folder.glob("*.xml")):
            return UserError(
                f"{root}: no '{split}' split; {folder} has Pascal VOC's XML files, but the set is in neither of its "
                f"layouts; name the folders images and annotations and put both into {split}/ or list the images in "
                f"ImageSets/Main/{split}.txt, or put images and XML files together in {split}/"
            )
    return None


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
