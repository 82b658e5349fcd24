"""Datasets in annotation files of one format: find the files of a split, and collect what a reader finds in them."""

from __future__ import annotations

import codecs
import json
import math
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..config.schema import DataConfig
from ..utils.errors import UserError
from ..utils.files import open_regular, read_regular
from .discovery import (
    HEAD,
    LABEL_FOLDERS,
    SPLIT_ALIASES,
    ImageFolder,
    child_folders,
    ensure_readable,
    find_image_folder,
    has_inner_splits,
    is_hidden,
    names_other_split,
    names_split,
    split_aliases,
    split_of,
)
from .issues import Issue
from .named import NamedSource, rotated_boxes, with_others
from .segmentation import Segmentation
from .source import ParsedAnnotations

MAX_OTHERS = 20  # files with the suffix of a format that are looked at


class Collector:
    """The images, objects and issues of one split, in the order in which a reader finds them.

    Args:
        masks: Whether readers give masks.
    """

    def __init__(self, masks: bool = False) -> None:
        self.masks = masks
        self.images: list[dict[str, Any]] = []
        self.objects: list[dict[str, Any]] = []
        self.issues: list[Issue] = []
        self.unused: Counter[str] = Counter()  # objects of subsets that are no split

    def image(self, name: str, height: Any = None, width: Any = None) -> int:
        """Add an image and return its id."""
        record: dict[str, Any] = {"id": len(self.images) + 1, "file_name": name}
        sides = [to_number(side) or 0 for side in (height, width)]
        if min(sides) >= 1:
            record |= {"height": int(sides[0]), "width": int(sides[1])}
        self.images.append(record)
        return record["id"]

    def add(
        self,
        image_id: int,
        label: Any,
        bbox: Sequence[float] | None,
        path: Path,
        record: str,
        mask: Segmentation | None = None,
    ) -> None:
        """Add the object at a place of a file, or an issue if its label or its xywh box is not valid."""
        name = "" if label is None or isinstance(label, dict | list) else str(label).strip()
        if not name or bbox is None or not all(map(math.isfinite, bbox)):
            message = f"({name!r}) has no box that can be read" if name else "has no class name"
            self.skip(path, record, message)
            return
        x, y, w, h = bbox
        if min(w, h) < 0:
            x, y, w, h = min(x, x + w), min(y, y + h), abs(w), abs(h)
            message = "has its corners in another order; the box between them is used"
            self.issues.append(Issue("box-swapped", path, record, message))
        where = f"{path.name} {record}"
        self.objects.append({"image_id": image_id, "class": name, "bbox": [x, y, w, h], "where": where})
        if mask is not None:
            self.objects[-1]["segmentation"] = mask

    def skip(self, path: Path, record: str, message: str, hint: str = "", objects: int = 1) -> None:
        """Add an issue about objects that are left out."""
        self.issues.append(Issue("label-row", path, record, message, hint or "correct or remove it", objects=objects))


@dataclass(frozen=True)
class FileSource(NamedSource):
    """One split in annotation files of one format; see `NamedSource`. The images are where `find_image_folder` says.

    Attributes:
        file: The file, or the folder of several, with the name of the subset if there is one.
        image_root: Folder that file names are relative to.
        files: The annotation files.
        subset: Name of the part of the files that is the split; '' for all.
    """

    file: Path
    image_root: Path
    files: tuple[Path, ...]
    root: Path = field(compare=False)
    split: str = field(compare=False)
    data: DataConfig = field(compare=False)
    subset: str = ""
    suffixes: ClassVar[tuple[str, ...]] = (".json",)
    per_image: ClassVar[bool] = False  # whether each file is about one image

    @property
    def annotation_files(self) -> tuple[Path, ...]:
        return self.files

    @classmethod
    @abstractmethod
    def accepts(cls, path: Path) -> bool:
        """Return whether the name and the first bytes of a file are those of this format."""

    @classmethod
    def subsets(cls, path: Path) -> set[str]:
        """Return the names of the splits in one file, if the format has such."""
        return set()

    @abstractmethod
    def read_file(self, path: Path, split: Collector) -> None:
        """Read one annotation file. Raise UserError if nothing in it can be read."""

    @classmethod
    def files_in(cls, folder: Path) -> list[Path]:
        """Return the annotation files in a folder. A folder with many others, such as files per image, has none."""
        ensure_readable(folder)
        names = [name for name in sorted(os.listdir(folder)) if not is_hidden(name)]
        paths = [folder / name for name in names if os.path.splitext(name)[1].lower() in cls.suffixes]
        files = [path for path in paths[:MAX_OTHERS] if path.is_file() and cls.accepts(path)]
        return files + [path for path in paths[MAX_OTHERS:] if files and path.is_file() and cls.accepts(path)]

    def parse(self, masks: bool = False) -> ParsedAnnotations:
        """Read the annotation files."""
        split = Collector(masks)
        for path in self.files:
            try:
                self.read_file(path, split)
            except UserError as error:
                split.issues.append(Issue.from_error("label-unreadable", path, error))
        for name, count in split.unused.items():
            message = f"has {count} objects of the subset {name!r}, which is neither train, val nor test"
            split.skip(self.files[0], "", message, "rename the subset", objects=count)
        return ParsedAnnotations({"images": split.images, "objects": split.objects}, split.issues)

    def in_split(self, subset: str, split: Collector, objects: int) -> bool:
        """Return whether a subset of a file is of this split. Objects of one that is no split count as left out."""
        if not self.subset or (split_of(subset) or subset) == (split_of(self.subset) or self.subset):
            return True
        if split_of(subset) is None and self.split == self.data.train_split:
            split.unused[subset] += objects
        return False

    def find_images(self, names: Sequence[str]) -> ImageFolder:
        """Find the folder of the images; see `find_image_folder`."""
        anchor = self.image_root / self.file.name
        return find_image_folder(anchor, self.root, self.split, self.data, names)


def find_annotation_files(reader: type[FileSource], root: Path, split: str, data: DataConfig) -> NamedSource | None:
    """Find one split in a format, None if the dataset is not in it.

    Searched: folders with the split's name; files with the split's name, or that name no split; subsets in a file. All
    of these also in folders such as `annotations`.

    Raises:
        UserError: The dataset is in this format but lacks the split.
    """
    names = (split, data.train_split, data.val_split, "test")
    first, *others = [_find_split(reader, root, name, data) for name in names]
    if first is None and any(others):
        files = next(other for other in others if other is not None).file
        raise UserError(f"{root}: no '{split}' split beside {files}; add a folder or file with the name '{split}'")
    return with_others([first, *others])


def _find_split(reader: type[FileSource], root: Path, split: str, data: DataConfig) -> FileSource | None:
    aliases = split_aliases(split)
    if root.is_file():
        usable = reader.accepts(root) and not names_other_split(root, split)
        return _source(reader, [root], root, split, data) if usable else None
    tops = [root, *child_folders(root, LABEL_FOLDERS)]
    named = [folder for top in (*tops, *child_folders(root, ("images",))) for folder in child_folders(top, aliases)]
    named += [inside for folder in named for inside in child_folders(folder, LABEL_FOLDERS)]
    for folder in named:
        if files := reader.files_in(folder):
            return _source(reader, files, root, split, data, folder)
    all_aliases = tuple(name for names in SPLIT_ALIASES for name in names)
    if reader.per_image and (any(child_folders(top, all_aliases) for top in tops) or has_inner_splits(root)):
        return None
    for folder in (*tops, *child_folders(root, ("images",))):
        files = reader.files_in(folder)
        if reader.per_image:
            files = [] if names_other_split(folder / "x", split) else files
        else:
            own = [path for path in files if names_split(path.stem, aliases)]
            files = own or [path for path in files if not names_other_split(path, split)]
        if files:
            return _source(reader, files, root, split, data, folder)
    return None


def _source(
    reader: type[FileSource], files: list[Path], root: Path, split: str, data: DataConfig, folder: Path | None = None
) -> FileSource | None:
    """Return the source of some files: of the subset with the split's name, or of all if none has a split's name."""
    file = files[0] if len(files) == 1 and not reader.per_image else folder or files[0]
    folder = folder or file.parent
    subsets = {name for path in files for name in reader.subsets(path)}
    own = next((name for name in sorted(subsets) if (split_of(name) or name) == (split_of(split) or split)), None)
    if own is not None:
        file = file.with_name(f"{file.name} (subset {own})")
        return reader(file, folder, tuple(files), root, split, data, own)
    if any(map(split_of, subsets)):
        return None
    return reader(file, folder, tuple(files), root, split, data)


def with_rotated(split: Collector, count: int, path: Path) -> None:
    """Add the issue of rotated boxes, if there are any."""
    if count:
        split.issues.append(rotated_boxes(count, path))


def to_number(value: Any) -> float | None:
    """Return a number or its text as a finite float, None for anything else."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def to_numbers(values: Any) -> list[float] | None:
    """Return all values as finite floats, None if one is not a number."""
    numbers = [to_number(value) for value in values] if isinstance(values, list | tuple) else []
    kept = [number for number in numbers if number is not None]
    return kept if kept and len(kept) == len(numbers) else None


def extent(points: Any) -> list[float] | None:
    """Return the xywh box around points [[x, y], …], None if these are not points."""
    pairs = [to_numbers(point) for point in points] if isinstance(points, list | tuple) else []
    valid = [pair for pair in pairs if pair is not None and len(pair) >= 2]
    if not valid or len(valid) < len(pairs):
        return None
    (x0, x1), (y0, y1) = ((min(values), max(values)) for values in ([pair[axis] for pair in valid] for axis in (0, 1)))
    return [x0, y0, x1 - x0, y1 - y0]


def head_of(path: Path) -> str:
    """Return the first bytes of a file as text; '' if it cannot be read."""
    try:
        with open_regular(path) as file:
            return decode(file.read(HEAD))
    except OSError:
        return ""


def decode(data: bytes) -> str:
    """Return the text of a file in UTF-8 or UTF-16."""
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if utf16 else "utf-8-sig", errors="replace")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    try:
        return json.loads(read_regular(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); make it readable") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({' '.join(str(error).split())}); export it again") from None
