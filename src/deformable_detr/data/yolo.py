"""YOLO datasets: class names in `data.yaml` or `classes.txt`, and a text file of normalized boxes per image."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml

from ..structures import Category
from ..utils.errors import UserError
from ..utils.files import read_regular
from ..utils.images import read_size
from ..utils.yaml_loader import BoundedLoader, read_yaml
from .discovery import (
    SPLIT_ALIASES,
    has_inner_splits,
    is_hidden,
    is_image,
    label_file,
    names_other_split,
    split_aliases,
    split_folders,
    walk_folder,
)
from .issues import Issue
from .labels import LabelTree, label_trees
from .matching import existing_tail, match_names
from .source import AnnotationCache, ParsedAnnotations, Source, category_ids_by_name, coco_dict, read_lines
from .yolo_rows import KeypointEvidence, Row, count_extra, count_rows, read_row, split_row

YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
# Label Studio, CVAT, darknet, LabelImg
CLASS_FILES = ("[Cc]lasses.txt", "*.names", "*/*.names", "*/classes.txt", "*/*/classes.txt")


class _TextLoader(BoundedLoader):
    """Loads all scalars as text: a class may be named yes, no, on, off or 007."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # keys <<


@dataclass(frozen=True)
class YoloSource(Source):
    """One split of a YOLO dataset; see `Source`.

    The label file of `…/images/….jpg` is `…/labels/….txt`, or is beside the image if there is no such folder. A row is
    `class cx cy w h`, or `class x1 y1 x2 y2 x3 y3 …` for a polygon, whose box is used. Coordinates are 0..1 of the
    upright image. An image without a label file, or with an empty one, has no objects.

    Attributes:
        file: The first of `places`.
        image_root: The dataset's folder, which file names are relative to.
        places: Folders, and text files with lists of images.
        names: Class names.
        keypoints: Number of keypoint values per row after the box, from `kpt_shape` in data.yaml.
        found: Issues of data.yaml.
    """

    file: Path
    image_root: Path
    places: tuple[Path, ...]
    names: tuple[str, ...]
    keypoints: int = 0
    found: tuple[Issue, ...] = field(default=(), compare=False)
    format: ClassVar[str] = "yolo"

    @property
    def image_trees(self) -> tuple[Path, ...]:
        return tuple(label_trees(place)[0] for place in self.places if place.is_dir())

    def has_labels(self) -> bool:
        """Return whether a label file has objects; lists and classes may be of other formats."""
        folders = [label_trees(place)[1] for place in self.places if place.is_dir()]
        files = (path for folder in folders for path in walk_folder(folder) if path.suffix.lower() == ".txt")
        return len(folders) < len(self.places) or any(map(count_rows, files))

    def to_coco(
        self, parsed: ParsedAnnotations, categories: Sequence[Category] | None, cache: AnnotationCache
    ) -> dict[str, Any]:
        """Return the COCO dict; category ids start at 0, or are those of `categories` by name."""
        ids = category_ids_by_name(self.names, categories, first=0)
        listed = [{"id": number, "name": name} for number, name in zip(ids, self.names, strict=True)]
        return coco_dict(parsed, dict(enumerate(ids)), listed)

    def parse(self, masks: bool = False) -> ParsedAnnotations:
        """Read the lists, the label files and the size of every image, also of keypoints without a `kpt_shape`."""
        evidence = KeypointEvidence()
        parsed = self._parse(evidence, masks)
        if self.keypoints or (shape := evidence.shape()) is None:
            return parsed
        count, size, certain = shape
        how = "read as such" if certain else "read as polygons"
        message = f"has {evidence.rows} rows that fit a box with {count} keypoints of {size} values, {how}"
        hint = f"set kpt_shape: [{count}, {size}] in data.yaml{'' if certain else ' if they are keypoints'}"
        if certain:
            parsed = replace(self, keypoints=count * size)._parse(KeypointEvidence(), masks)
        issue = Issue("label-keypoints", self.file, "", message, hint)
        return replace(parsed, issues=[*parsed.issues, issue])

    def _parse(self, evidence: KeypointEvidence, masks: bool) -> ParsedAnnotations:
        issues = list(self.found)
        images: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        paths = self._images(issues)
        label_of = self._label_files(paths, issues)
        for path in paths:
            record: dict[str, Any] = {"id": len(images) + 1, "file_name": _relative_name(path, self.image_root)}
            images.append(record)
            labels = label_of[path]
            try:
                height, width = read_size(path)
            except UserError as error:
                issues.append(Issue.from_error("image-unreadable", path, error, objects=count_rows(labels) or 0))
                continue
            record |= {"height": height, "width": width}
            for line, (label, (x0, y0, x1, y1), polygon) in self._rows(labels, issues, evidence):
                bbox = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]
                where = f"{labels.name} line {line}"
                objects.append({"image_id": record["id"], "class": label, "bbox": bbox, "where": where})
                if masks and polygon:
                    objects[-1]["segmentation"] = [np.array(polygon) * np.tile((width, height), len(polygon) // 2)]
        return ParsedAnnotations({"images": images, "objects": objects}, issues)

    def _label_files(self, images: Sequence[Path], issues: list[Issue]) -> dict[Path, Path]:
        """Return the label file of each image; see `LabelTree.assign`."""
        trees_of = cache(label_trees)

        def label_of(image: Path) -> Path:
            image_root, label_root = trees_of(image.parent)
            return label_file(label_root / image.parent.relative_to(image_root), image.stem, "txt")

        assigned = {image: label_of(image) for image in images}
        trees = {trees_of(place) for place in self.places if place.is_dir()}
        trees |= {trees_of(image.parent) for image in images}
        roots = {image_root for image_root, _ in trees}
        for image_root, label_root in sorted(trees):
            if roots.isdisjoint(image_root.parents):
                listed = [image for image in images if image.is_relative_to(image_root)]
                tree = LabelTree.scan(image_root, label_root, ".txt", label_of, listed)
                assigned |= tree.assign(images, count_rows, issues, listed=not any(map(Path.is_dir, self.places)))
        return assigned

    def _images(self, issues: list[Issue]) -> list[Path]:
        images: list[Path] = []
        for place in self.places:
            if place.is_dir():
                images += sorted(path for path in walk_folder(place) if is_image(path.relative_to(place)))
                continue
            unknown: dict[str, int] = {}  # line numbers
            for number, line in enumerate(read_lines(place), start=1):
                if not (text := line.strip()):
                    continue
                # Paths are relative to the list (./…) or to data.yaml, or absolute.
                # Darknet's and CVAT's lists are relative to the folder above one named data.
                texts = dict.fromkeys((text, text.replace("\\", "/"), text.removeprefix("data/")))
                candidates = [base / path for path in texts for base in (place.parent, self.image_root)]
                image = next((candidate for candidate in candidates if os.path.isfile(candidate)), None)
                if image is not None:
                    images.append(image)
                else:
                    unknown[text] = number
            images += self._similar_images(place, unknown, images, issues)
        return images

    def _similar_images(
        self, place: Path, lines: Mapping[str, int], images: Sequence[Path], issues: list[Issue]
    ) -> list[Path]:
        """Find the images of the lines of a list that name no file; see `match_names`."""
        files: dict[str, Path] = {}
        for path in walk_folder(self.image_root) if lines else ():
            if is_image(relative := path.relative_to(self.image_root)):
                files[str(relative)] = path
        matches = match_names(lines, files.keys() - {_relative_name(image, self.image_root) for image in images})
        for text, number in lines.items():
            message, code = f"names the image {text!r}, which is missing", "image-missing"
            if text in matches:
                message, code = f"{message}: {matches[text]!r} is read instead", "image-name"
            issues.append(Issue(code, place, f"line {number}", message))
        return [files[matches[text]] for text in lines if text in matches]

    def _rows(self, path: Path, issues: list[Issue], evidence: KeypointEvidence) -> Iterator[tuple[int, Row]]:
        """Yield the line number and the content of each valid row of a label file."""
        try:
            lines = read_lines(path)
        except UserError as error:
            missing = isinstance(error.__cause__, FileNotFoundError | NotADirectoryError) and not path.is_symlink()
            if not missing:  # an image without a label file has no objects
                issues.append(Issue.from_error("label-unreadable", path, error))
            return
        extra: list[int] = []
        swapped: list[int] = []
        for number, line in ((number, text) for number, text in enumerate(lines, start=1) if text.strip()):
            try:
                label, box, polygon = read_row(line, len(self.names), self.keypoints)
            except ValueError as error:
                issues.append(Issue("label-row", path, f"line {number}", str(error), objects=1))
                continue
            evidence.add(line)
            extra += [number] if count_extra(split_row(line), self.keypoints) else []
            swapped += [number] if box[0] > box[2] or box[1] > box[3] else []
            (x0, x1), (y0, y1) = sorted(box[::2]), sorted(box[1::2])
            yield number, (label, (x0, y0, x1, y1), polygon)
        if extra:
            message = f"{_have(extra)} values after the box, such as a confidence or track id, which are ignored"
            issues.append(Issue("label-confidence", path, f"line {extra[0]}", message))
        if swapped:
            message = f"{_have(swapped)} a negative width or height; its sign is ignored"
            issues.append(Issue("box-swapped", path, f"line {swapped[0]}", message))


def _relative_name(path: Path, folder: Path) -> str:
    """Return a path relative to a folder; if it leads out of it, relative to the folder's real path."""
    if path.is_relative_to(folder) and ".." not in (inside := path.relative_to(folder)).parts:
        return str(inside)
    return os.path.relpath(Path(os.path.realpath(path.parent), path.name), os.path.realpath(folder))


def _have(lines: Sequence[int]) -> str:
    return f"and {len(lines) - 1} more rows have" if len(lines) > 1 else "has"


def find_yaml(root: Path) -> Path | None:
    """Return the data.yaml of a dataset, or `root` itself if it is a YAML file."""
    if root.is_file():
        return root if root.suffix.lower() in (".yaml", ".yml") else None
    named = [root / name for name in YAML_NAMES if (root / name).is_file()]
    if named or not root.is_dir():
        return named[0] if named else None
    others = [path for path in root.iterdir() if path.suffix.lower() in (".yaml", ".yml") and not is_hidden(path.name)]
    readable = len(others) == 1 and others[0].is_file() and os.access(others[0], os.R_OK)
    return others[0] if readable and b"names" in read_regular(others[0]) else None


def find_yolo(file: Path, split: str) -> YoloSource:
    """Find one split of the dataset that a data.yaml describes.

    Raises:
        UserError: The file is invalid or lacks the split.
    """
    content = _read_yaml(file)
    names = _class_names(content.get("names"), content.get("nc"), file)
    aliases = split_aliases(split)
    key = next((name for name in aliases if content.get(name)), None)
    if key is None:
        raise UserError(f"{file}: no '{split}' split; add a key {' or '.join(aliases[:2])} with a folder of images")
    places, keypoints = _places(file, content, key), _num_keypoint_values(content.get("kpt_shape"), file)
    found = [Issue("path-moved", file.parent, "", message) for _, message in places if message]
    keys = [name for names in SPLIT_ALIASES for name in names if content.get(name)]
    if key == next(iter(keys), key):  # once per dataset
        found += _other_names(file, names, content, keys)
    folders = tuple(path for path, _ in places)
    return YoloSource(folders[0], file.parent, folders, names, keypoints, tuple(found))


def _places(file: Path, content: Mapping[str, Any], key: str) -> list[tuple[Path, str]]:
    """Resolve the folders and lists of a split; see `_resolve`."""
    value = content[key]
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str) for entry in values):
        raise UserError(f"{file}: '{key}' must be a folder, a text file, or a list of these")
    return [_resolve(file, content.get("path"), entry, key) for entry in values]


def _other_names(file: Path, names: Sequence[str], content: Mapping[str, Any], keys: Sequence[str]) -> list[Issue]:
    """Return an issue for each list of classes beside the labels that contradicts those of a data.yaml."""
    issues: list[Issue] = []
    roots: list[Path] = []
    for key in keys:
        with suppress(UserError):  # reported when that split is read
            places = [place for place, _ in _places(file, content, key)]
            roots += [label_trees(place)[1] if place.is_dir() else place.parent for place in places]
    with suppress(UserError):  # a list that cannot be read
        for path, others in _class_lists(file.parent).items():
            beside = any(root.is_relative_to(path.parent) or path.parent.is_relative_to(root) for root in roots)
            pairs = enumerate(zip(names, others, strict=False)) if beside else ()
            number = next((n for n, (name, other) in pairs if name.casefold() != other.casefold()), None)
            if number is not None:
                message = f"names class {number} {others[number]!r}, but {file} says {names[number]!r}, which is used"
                issues.append(Issue("classes-differ", path, f"line {number + 1}", message))
    return issues


def find_yolo_without_yaml(root: Path, split: str) -> YoloSource | None:
    """Find one split of a dataset with one of `CLASS_FILES` instead of a data.yaml.

    Without split folders, lists such as train.txt name the images. Images outside all of these match any split.
    """
    if (found := _find_classes(root)) is None:
        return None
    folders = split_folders(root) or _lists(root)
    folder = next((folders[name] for name in split_aliases(split) if name in folders), None)
    if folder is None:
        if folders or names_other_split(root / "x", split) or has_inner_splits(root):
            return None
        folder = root / "images" if (root / "images").is_dir() else root
    if folder.is_dir() and not any(is_image(path.relative_to(folder)) for path in walk_folder(folder)):
        return None
    file, names = found
    return YoloSource(folder, root, (folder,), _class_names(names, None, file))


def _lists(root: Path) -> dict[str, Path]:
    """Find the text files that are named after splits and list images, in a folder or its data."""
    paths = [root / place / f"{name}.txt" for place in ("", "data") for names in SPLIT_ALIASES for name in names]
    files = [path for path in reversed(paths) if path.is_file()]
    return {path.stem: path for path in files if is_image(next(iter(read_lines(path)), "").strip())}


def _class_lists(root: Path) -> dict[Path, list[str]]:
    """Read the files with class names in a folder; LabelImg writes a copy into each folder of labels."""
    patterns = CLASS_FILES if root.is_dir() else ()
    paths = [path for pattern in patterns for path in sorted(glob(pattern, root_dir=root))]  # ignores loops of links
    lists: dict[Path, list[str]] = {}
    for path in dict.fromkeys(paths):
        if not is_hidden(path) and os.path.isfile(root / path):
            lines = "\n".join(read_lines(root / path)).strip().splitlines()
            lists[root / path] = [line.strip() for line in lines]
    return lists


def _find_classes(root: Path) -> tuple[Path, list[str]] | None:
    """Find the class names of a dataset; LabelImg may extend one of its copies."""
    lists = _class_lists(root)
    longest = max(lists, key=lambda file: len(lists[file]), default=None)
    if longest is None:
        return None
    for file, names in lists.items():
        if names != lists[longest][: len(names)]:
            raise UserError(f"{file}: lists other classes than {longest}; use one list of classes for all splits")
    return longest, lists[longest]


def _read_yaml(file: Path) -> dict[str, Any]:
    """Read a data.yaml, with all scalars as text."""
    try:
        content = read_yaml(file, _TextLoader)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not valid YAML ({str(error)[:200]}); correct it") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: lacks the keys 'names', 'train' and 'val' of a YOLO dataset; add them")
    lower = {str(key).lower(): value for key, value in content.items()}  # CVAT writes Train and Validation
    return lower | content


def _class_names(names: Any, count: Any, file: Path) -> tuple[str, ...]:
    hint = "list the classes, for example names: [cat, dog] or {0: cat, 1: dog}"
    if isinstance(names, dict):
        names = [names.get(str(number)) for number in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{file}: 'names' is not a list of names; {hint}")
    name, uses = Counter(names).most_common(1)[0]
    if uses > 1:
        raise UserError(f"{file}: 'names' lists {name[:200]!r} twice; give each class its own name")
    if _is_digits(count) and int(count) != len(names):
        raise UserError(f"{file}: nc is {count} but 'names' has {len(names)} entries; make them agree")
    return tuple(names)


def _num_keypoint_values(shape: Any, file: Path) -> int:
    """Return the number of keypoint values per row: `kpt_shape` is [keypoints, values per keypoint]."""
    if not shape:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(_is_digits(text) and int(text) for text in shape):
        raise UserError(f"{file}: 'kpt_shape' must be two integers, as in [17, 3] for 17 keypoints of x, y, visible")
    return int(shape[0]) * int(shape[1])


def _is_digits(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[0-9]{1,9}", text) is not None


def _resolve(file: Path, base: Any, value: str, key: str) -> tuple[Path, str]:
    """Resolve a split's path, which is relative to `path` or to data.yaml; Roboflow writes ../train/images.

    Returns the path, and a message if only the end of the path exists here.
    """
    parent = file.parent
    roots = [parent / base, Path(base)] if isinstance(base, str) and base else []
    candidates = []
    for text in dict.fromkeys((value, value.replace("\\", "/"))):
        candidates += [root / text for root in (*roots, parent)]
        if text.startswith("../"):
            candidates += [root / text.removeprefix("../") for root in (*roots, parent)]
    for path in candidates:
        if os.path.exists(path):  # unlike Path.exists, it takes any text
            return path, ""
    if tail := existing_tail(value, (parent,)):
        return Path(tail), f"{file.name}: '{key}' is {value[:200]}, which is missing: {tail} is read instead"
    first = str(candidates[0])[:300]
    raise UserError(f"{file}: '{key}' is {value[:200]}, which is neither folder nor file ({first}); correct the path")
