"""One split of a dataset on disk, in any format, and what all formats share."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from abc import ABC, abstractmethod
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..structures import Category
from ..utils.errors import UserError
from ..utils.files import read_regular
from .discovery import ImageFolder, names_split, split_aliases
from .issues import Issue, OnIssue, raise_error

BROKEN_MASK = "broken_mask"  # key of an object: what is wrong with its mask


@dataclass(frozen=True)
class ParsedAnnotations:
    """Annotations as parsed from the files, before category ids are assigned.

    Attributes:
        content: The COCO dict, or a dict with 'images' and 'objects' of another format.
        issues: Records that were left out.
        digest: SHA-256 of the file in hexadecimal; empty if there are many files.
    """

    content: dict[str, Any]
    issues: Sequence[Issue] = ()
    digest: str = ""


class Source(ABC):
    """One split on disk. Equal sources read the same files.

    Attributes:
        file: The file or folder that identifies the split in messages; no two splits share it.
        image_root: Folder that file names are relative to, if the format says so.
        format: 'coco', 'yolo' or 'voc'.
    """

    file: Path
    image_root: Path
    format: ClassVar[str]

    @abstractmethod
    def parse(self, masks: bool = False) -> ParsedAnnotations:
        """Read and parse the annotation files; use `AnnotationCache.parse` to do it once.

        With `masks`, objects have a 'segmentation', as `read_segmentation` returns it, if they have a mask; and under
        `BROKEN_MASK` what is wrong with it, if it is not or only partly usable.
        """

    @abstractmethod
    def to_coco(
        self, parsed: ParsedAnnotations, categories: Sequence[Category] | None, cache: AnnotationCache
    ) -> dict[str, Any]:
        """Build the COCO dict. Formats without category ids take those of `categories` by name."""

    @property
    def annotation_files(self) -> tuple[Path, ...]:
        """The files about many images that are read. Default: `file`."""
        return (self.file,)

    @property
    def image_trees(self) -> tuple[Path, ...]:
        """The folders whose images in formats that are not read are reported. Default: none."""
        return ()

    def has_labels(self) -> bool:
        """Return whether there is a label file. Default: the split was found by it."""
        return True

    def is_named(self, split: str, root: Path) -> bool:
        """Return whether a folder or file of the split below `root` has the split's name."""
        inside = self.file.relative_to(root).parts if self.file.is_relative_to(root) else ()
        return any(names_split(part, split_aliases(split)) for part in inside)

    def issues(self, parsed: ParsedAnnotations, cache: AnnotationCache) -> Sequence[Issue]:
        """Return the issues of the files. Default: those of parsing."""
        return parsed.issues

    def find_images(self, names: Sequence[str]) -> ImageFolder:
        """Find the images by their file names. Default: in `image_root`."""
        return ImageFolder(self.image_root, {name: "" for name in names if not (self.image_root / name).is_file()})

    def read(
        self,
        categories: Sequence[Category] | None = None,
        on_issue: OnIssue = raise_error,
        cache: AnnotationCache | None = None,
    ) -> dict[str, Any]:
        """Return the COCO dict and report all issues of the files; see `to_coco`."""
        cache = cache or AnnotationCache()
        parsed = cache.parse(self)
        for issue in self.issues(parsed, cache):
            on_issue(issue)
        return self.to_coco(parsed, categories, cache)


class AnnotationCache:
    """Parse each split's annotation files once, however often they are read.

    Share one cache between a check and the datasets that follow it, then drop it: it keeps the parsed annotations.

    Args:
        masks: Whether to read masks.
    """

    def __init__(self, masks: bool = False) -> None:
        self.masks = masks
        self._parsed: dict[Source, ParsedAnnotations] = {}

    def parse(self, source: Source) -> ParsedAnnotations:
        """Return the parsed annotations of a split."""
        if source not in self._parsed:
            self._parsed[source] = source.parse(self.masks)
        return self._parsed[source]


def same_split(first: Source, second: Source) -> bool:
    """Return whether two splits are the same files."""
    return os.path.realpath(first.file) == os.path.realpath(second.file)


def split_command_hint(root: Path | str) -> str:
    """Return the hint to create a validation split with the `split` command."""
    return f"split it with deformable-detr split {shlex.quote(str(root))} --out NEW"


def distinct_val_hint(source: Source, root: Path | str) -> str:
    """Return the hint for a validation split that is also the training split."""
    if source.format == "yolo":
        return f"{split_command_hint(root)}, or name another folder under val in data.yaml"
    option = ", or set data.val_images and data.val_annotations" if source.format == "coco" else ""
    return f"{split_command_hint(root)}{option}"


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file in UTF-8, or in UTF-16 as PowerShell writes it."""
    try:
        data = read_regular(path)
        return data.decode("utf-16" if data[:2] in (BOM_UTF16_LE, BOM_UTF16_BE) else "utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        hint = "make it readable" if isinstance(error, OSError) else "save it as UTF-8"
        raise UserError(f"{path}: cannot be read as UTF-8 text ({reason}); {hint}") from error


def coco_dict(
    parsed: ParsedAnnotations, ids: Mapping[Any, int], categories: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Build the COCO dict of a format whose objects have a 'class' instead of a category id.

    Each annotation keeps 'where', its place in the label files.
    """
    annotations = [
        {
            "id": number,
            "image_id": item["image_id"],
            "category_id": ids[item["class"]],
            "bbox": item["bbox"],
            "area": max(0.0, item["bbox"][2]) * max(0.0, item["bbox"][3]),
            "iscrowd": 0,
            "where": item["where"],
            **{key: item[key] for key in ("segmentation", BROKEN_MASK) if key in item},
        }
        for number, item in enumerate(parsed.content["objects"], start=1)
    ]
    return {"images": parsed.content["images"], "annotations": annotations, "categories": list(categories)}


def content_hash(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a COCO dict in hexadecimal; it does not depend on where the folder is."""
    annotations = [{k: v for k, v in a.items() if k != "where"} for a in content["annotations"]]
    text = json.dumps({**content, "annotations": annotations}, sort_keys=True, default=np.ndarray.tolist)
    return hashlib.sha256(text.encode()).hexdigest()


def category_ids_by_name(names: Sequence[str], categories: Sequence[Category] | None, first: int) -> list[int]:
    """Return an id per name: that of the category with this name, otherwise a new one. Default ids: `first`, …"""
    if categories is None:
        return list(range(first, first + len(names)))
    known = {category.name: category.id for category in categories}
    new_id = max((category.id for category in categories), default=0)
    ids = []
    for name in names:
        if name not in known:
            new_id += 1
        ids.append(known.get(name, new_id))
    return ids


def remap_category_ids(
    file_categories: Sequence[Category], categories: Sequence[Category], used: Container[int]
) -> dict[int, int]:
    """Map category ids of a file to those of a model that lists the same names under other ids; {} to keep the ids.

    Names decide if each is unique in both lists and `categories` has every file category that objects use. Otherwise
    ids decide, because the unknown name may be the mistake. Unused and unknown categories get no id.
    """
    ids = {category.name: category.id for category in categories}
    names = {category.name for category in file_categories}
    unknown = any(category.name not in ids and category.id in used for category in file_categories)
    if len(ids) < len(categories) or len(names) < len(file_categories) or unknown:
        return {}
    mapping = {category.id: ids[category.name] for category in file_categories if category.name in ids}
    return mapping if any(old != new for old, new in mapping.items()) else {}
