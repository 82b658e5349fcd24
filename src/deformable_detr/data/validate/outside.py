"""Labeled images that are in no split, such as images/more beside images/train."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ...config.schema import DataConfig
from ...utils.errors import UserError
from ...utils.files import open_regular
from ..annotation_files import read_json
from ..coco import CocoSource
from ..csv_table import CsvSource
from ..discovery import (
    LABEL_FOLDERS,
    configured_annotations,
    is_coco,
    is_hidden,
    is_image,
    is_unread_image,
    split_aliases,
    walk_folder,
)
from ..formats import READERS
from ..issues import Issue, Issues
from ..labelme import LabelmeSource
from ..source import Source
from ..voc import count_objects
from ..yolo import find_yaml
from ..yolo_rows import count_rows
from .annotations import Split

# Folders that do not count when the path of an image is compared with that of its label file.
_KINDS = {*LABEL_FOLDERS, "images", "image", "imgs", "img", "jpegimages", "data"}
_RESULTS = {"runs"}  # where Ultralytics writes predictions
_SUFFIXES = {".txt", *(suffix for reader in (*READERS, CsvSource) for suffix in reader.suffixes)}
_Key = tuple[str, ...]
_Labels = tuple[int, Path, str]  # number of objects of an image, the file with them, and its format


def check_outside(root: Path, splits: Sequence[Split], data: DataConfig, issues: Issues) -> None:
    """Add an issue per folder of labeled images that are in no split, unless they are copies of images in one."""
    listed = [image.path for split in splits for image in split.images]
    train = next((split for split in splits if split.name == data.train_split and split.images), None)
    is_split_file = root.is_file() and (find_yaml(root) is None or len({path.is_absolute() for path in listed}) > 1)
    if train is None or is_split_file or any(configured_annotations(split.name, data) for split in splits):
        return
    base = root if root.is_dir() else Path(os.path.commonpath([path.parent.parent for path in listed]))
    base = base.parent if base != root and base.name.lower() in _KINDS else base
    try:
        images, label_files = _scan(base, {os.path.realpath(folder) for folder in {path.parent for path in listed}})
    except UserError as error:
        issues.append(Issue.from_error("outside-splits", base, error, split=train.name))
        return
    trees = [tree for split in splits for tree in split.source.image_trees]
    images = {path for path in images if is_image(path.name) or not any(map(path.is_relative_to, trees))}
    if data.val_split not in {split.name for split in splits}:  # told as missing
        words = set(split_aliases(data.val_split))
        images = {path for path in images if words.isdisjoint(map(str.lower, path.relative_to(base).parts))}
    if not images or "splits-same" in {issue.code for issue in issues}:
        return
    read = {path for split in splits for path in split.source.annotation_files} | {issue.file for issue in issues}
    label_files = [path for path in label_files if path not in read]
    labels: dict[Path, _Labels] = {}
    for image, found in _find_labels(base, images, label_files, {_key(path, base) for path in listed}, data):
        labels[image] = max(labels.get(image, found), found)
    _drop_copies(labels, listed)
    _report(base, labels, train, issues)


def _scan(base: Path, folders: Collection[str]) -> tuple[set[Path], list[Path]]:
    """Return the images that are not directly in one of these folders, and all files that may have labels."""
    images: set[Path] = set()
    label_files: list[Path] = []
    for path in walk_folder(base):
        inside = path.relative_to(base)
        if is_hidden(inside) or inside.parts[0].lower() in _RESULTS:
            continue
        if inside.suffix.lower() in _SUFFIXES:
            label_files.append(path)
        elif is_image(inside) or is_unread_image(inside):
            images.add(path)
    outside = {folder for folder in {path.parent for path in images} if os.path.realpath(folder) not in folders}
    return {path for path in images if path.parent in outside}, label_files


def _key(path: Path, base: Path) -> _Key:
    """Return what the paths of an image and of its label file have in common."""
    inside = path.relative_to(base) if path.is_relative_to(base) else path
    return (*(part for part in map(str.lower, inside.parent.parts) if part not in _KINDS), inside.stem)


def _find_labels(
    base: Path, images: Collection[Path], label_files: Sequence[Path], listed: Collection[_Key], data: DataConfig
) -> Iterator[tuple[Path, _Labels]]:
    """Yield the images that have objects in a label file."""
    by_key: dict[_Key, list[Path]] = defaultdict(list)
    by_stem: dict[_Key, list[Path]] = defaultdict(list)
    for image in images:
        by_key[_key(image, base)].append(image)
        by_stem[image.stem,].append(image)  # all labels in one folder
    for path in label_files:
        key = _key(path, base)
        if key in listed:
            continue
        own = by_key.get(key) or by_stem.get(key, [])
        if len(own) == 1 and (count := _count(path)):
            yield own[0], (count, path, {".txt": "yolo", ".xml": "voc"}.get(path.suffix.lower(), "labelme"))
        elif path.suffix.lower() != ".txt":
            yield from ((image, found) for image, found in _read_file(path, base, data) if image in images)


def _count(path: Path) -> int:
    """Return the number of objects in a label file of one image."""
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return count_rows(path) or 0
    if suffix == ".xml":
        return count_objects(path)
    return _count_shapes(path) if LabelmeSource.accepts(path) else 0


def _count_shapes(path: Path) -> int:
    with suppress(UserError, LookupError, TypeError):  # not a valid file
        return len(read_json(path)["shapes"])
    return 0


def _read_file(path: Path, base: Path, data: DataConfig) -> Iterator[tuple[Path, _Labels]]:
    """Yield the images that have objects in an annotation file of many images."""
    with suppress(UserError, LookupError, TypeError, AttributeError):  # not a valid file
        reader = next((reader for reader in (*READERS, CsvSource) if reader.accepts(path)), None)
        if reader is None and not is_coco(path):
            return
        source: Source = CocoSource(path, path, base, path.stem, data)
        if reader is not None:
            source = reader(path, path.parent, (path,), base, path.stem, data)
        content = source.parse().content
        objects = content.get("objects") or content.get("annotations") or ()
        counts = Counter(item["image_id"] for item in objects if item.get("bbox"))
        names = {image["file_name"]: counts[image["id"]] for image in content["images"] if counts[image["id"]]}
        folder = source.find_images(list(names))
        for name, count in names.items():
            yield folder.path / (folder.missing.get(name) or name), (count, path, source.format)


def _drop_copies(labels: dict[Path, _Labels], listed: Sequence[Path]) -> None:
    """Remove the images with the bytes of an image of a split: that one is read."""
    sizes = {path.stat().st_size for path in labels}
    same = [path for path in listed if path.is_file() and path.stat().st_size in sizes] if labels else []
    digests = {_digest(path) for path in same}
    for path in list(labels) if digests else ():
        if _digest(path) in digests:
            del labels[path]


def _digest(path: Path) -> bytes:
    with suppress(OSError), open_regular(path) as file:
        return hashlib.file_digest(file, "blake2b").digest()
    return b""


def _report(base: Path, labels: dict[Path, _Labels], train: Split, issues: Issues) -> None:
    folders: dict[Path, list[Path]] = defaultdict(list)
    for image in sorted(labels):
        folders[image.parent].append(image)
    target, own_format = os.path.relpath(train.images[0].path.parent, base), train.source.format
    for folder, images in folders.items():
        count, (_, path, label_format) = sum(labels[image][0] for image in images), labels[images[0]]
        is_test = not set(split_aliases("test")).isdisjoint(map(str.lower, folder.relative_to(base).parts))
        what = f"{len(images)} labeled images" if len(images) > 1 else "a labeled image"
        objects = "1 object" if count == 1 else f"{count} objects"
        message = f"has {what} with {objects} in no split: {images[0].name} ({os.path.relpath(path, base)})"
        hint = f"move images and label files to those of a split, such as {target}"
        if label_format != own_format:
            hint = f"convert the labels to the format of the splits ({own_format}) and add them to a split"
        elif is_test and own_format == "yolo":
            hint = "name this folder under test in data.yaml"
        elif path.stem != images[0].stem:
            hint = f"merge {path.name} with the annotations of a split, or move it into a folder with a split's name"
        split = "test" if is_test else train.name
        issues.add("outside-splits", folder, "", message, hint, split=split, objects=count)
