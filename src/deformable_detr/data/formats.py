"""Detect the format of a dataset: the first reader that finds the split in it."""

import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from itertools import islice
from pathlib import Path

from ..config.schema import DataConfig
from ..utils.errors import UserError
from ..utils.files import read_regular
from .annotation_files import FileSource, find_annotation_files
from .coco import find_coco
from .createml import CreateMlSource
from .csv_table import CsvSource
from .cvat import CvatSource
from .discovery import (
    ROBOFLOW,
    child_folders,
    configured_annotations,
    ensure_readable,
    find_annotations,
    is_hidden,
    split_aliases,
    walk_folder,
)
from .imagefolder import ImageFolderSource
from .labelme import LabelmeSource
from .source import Source
from .unread_formats import content_summary, unread_format
from .voc import find_voc
from .yolo import find_yaml, find_yolo, find_yolo_without_yaml

MAX_FOLDERS = 20  # that are searched for a dataset
LAYOUT_FOLDERS = {"annotations", "images", "labels", "jpegimages", "imagesets"}  # parts of one dataset
READERS: tuple[type[FileSource], ...] = (CvatSource, CreateMlSource, ImageFolderSource)
LATE_READERS: tuple[type[FileSource], ...] = (CsvSource, LabelmeSource)  # these files may lie beside other formats


class _NoFormatError(UserError):
    """No format matches; only then other files are looked at."""


def find_source(root: Path, split: str, data: DataConfig) -> Source:
    """Find one split of the dataset at `root`.

    The dataset may be in another folder, if it is the only one there. The formats are tried in this order: COCO JSON
    with a name that says so, YOLO with a data.yaml, CVAT, Create ML, Hugging Face ImageFolder, Pascal VOC, YOLO without
    a data.yaml, CSV, labelme, other COCO JSON.

    Raises:
        UserError: There is no such split.
    """
    splits = {data.train_split, data.val_split, "test"}
    try:
        source = _find(root, split, data)
        _ensure_one_folder(source, root, split, data)
        return source
    except _NoFormatError as error:
        if any(_has(root, name, data) for name in splits - {split}):
            raise
        inner = list(islice(_inner_datasets(root, splits, data), 2))
        if len(inner) == 2:
            raise UserError(
                f"{root}: has several datasets, such as {inner[0]} and {inner[1]}; give one, or merge them"
            ) from None
        if inner:
            return find_source(inner[0], split, data)
        if (unread := unread_format(root)) is not None:
            raise unread from None
        raise UserError(f"{error} (the folder has {content_summary(root)})") from None


def _ensure_one_folder(source: Source, root: Path, split: str, data: DataConfig) -> None:
    """Raise UserError if two folders may be the split, such as val and valid, and nothing says which is."""
    inside = source.file.parts[len(root.parts) :]
    if {part.lower() for part in inside}.isdisjoint(split_aliases(split)) or configured_annotations(split, data):
        return
    if find_yaml(root) is not None:
        return
    for parent in (root, *child_folders(root, ("images",))):
        folders = [path for path in child_folders(parent, split_aliases(split)) if any(walk_folder(path))]
        if len(folders) > 1 and any(source.file.is_relative_to(path) for path in folders):
            first, second = folders[:2]
            raise UserError(f"{root}: {first.name} and {second.name} may both be the '{split}' split; merge them")


def _inner_datasets(root: Path, splits: Collection[str], data: DataConfig, depth: int = 3) -> Iterator[Path]:
    """Yield the folders in a folder, and in these, that are datasets."""
    names = sorted(os.listdir(root)) if root.is_dir() else []
    folders = [root / name for name in names if not is_hidden(name) and os.path.isdir(root / name)]
    if len(folders) > MAX_FOLDERS or LAYOUT_FOLDERS & {folder.name.lower() for folder in folders}:
        return
    for folder in folders:
        if any(_has(folder, name, data) for name in splits):
            yield folder
        elif depth > 1:
            yield from _inner_datasets(folder, splits, data, depth - 1)


def _has(root: Path, split: str, data: DataConfig) -> bool:
    try:
        return _find(root, split, data) is not None
    except UserError:
        return False


def _find(root: Path, split: str, data: DataConfig) -> Source:
    ensure_readable(root)
    if root.is_file():
        if (yaml := find_yaml(root)) is not None:
            return find_yolo(yaml, split)
        if (source := _find_other(root, split, data)) is not None:
            return source
    error: UserError | None = None
    try:
        file = find_annotations(root, split, data)
        coco = find_coco(file, root, split, data)
        # The only JSON file of a folder may be anything if the dataset is clearly in another format.
        certain = configured_annotations(split, data) or (file.name == ROBOFLOW and coco.is_named(split, root))
        if certain or file.stem.startswith("instances_"):
            return coco
        if file.name == ROBOFLOW:
            with suppress(UserError):
                other = _find_other(root, split, data)
                if other is not None and other.is_named(split, root) and other.has_labels():
                    return other
            return coco
    except UserError as coco_error:
        if configured_annotations(split, data) or not root.is_dir():
            raise
        file, error = root, coco_error
    yaml = find_yaml(root)
    source = find_yolo(yaml, split) if yaml else _find_other(root, split, data)
    if source is not None:
        return source
    readable = file.is_file() and os.access(file, os.R_OK)
    if error is None and (
        not readable or (file.suffix.lower() == ".json" and re.search(rb'"images"\s*:', read_regular(file)))
    ):
        return find_coco(file, root, split, data)
    if error is None and file == root:
        raise unread_format(file) or UserError(
            f"{root}: is in no known format; give COCO JSON, or the dataset's folder"
        )
    reason = f"{file.name} has no list 'images'; add COCO JSON, a data.yaml, or classes.txt and images/{split}"
    if error is None or "; searched " in str(error):
        raise _NoFormatError(str(error or f"{root}: no '{split}' split; {reason}"))
    raise error


def _find_other(root: Path, split: str, data: DataConfig) -> Source | None:
    """Find one split in a format other than COCO JSON and YOLO with a data.yaml; one with the split's name is best."""
    splits = (data.train_split, data.val_split, "test")
    finders: list[Callable[[], Source | None]] = [
        *(partial(find_annotation_files, reader, root, split, data) for reader in READERS),
        partial(find_voc, root, split, splits, data.voc_origin),
        partial(find_yolo_without_yaml, root, split),
        *(partial(find_annotation_files, reader, root, split, data) for reader in LATE_READERS),
    ]
    unnamed: Source | None = None
    for find in finders:
        with suppress(UserError) if unnamed is not None else nullcontext():
            source = find()
            if source is not None and source.is_named(split, root) and source.has_labels():
                return source
            unnamed = unnamed or source
    return unnamed
