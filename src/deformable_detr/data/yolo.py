"""YOLO sets: the class names in `data.yaml` or `classes.txt`, and a text file of normalized boxes for each image."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml

from ..structures import Category
from ..utils.errors import UserError
from ..utils.images import read_size
from .discovery import (
    ALIASES,
    is_hidden,
    is_image,
    label_file,
    names_other_split,
    refuse_unreadable,
    split_aliases,
    unreadable,
)
from .problems import OnProblem, ids_by_name, refuse

YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
CLASSES = ("classes.txt", "labels/classes.txt", "obj.names")  # of Label Studio, LabelImg and CVAT: a name a line
LABELS = ("labels", "Labels", "LABELS")
SLACK = 0.01  # so far outside 0..1 a value may lie: rounding, not another unit


class _TextLoader(yaml.SafeLoader):
    """All scalars as the text that stands there: a class may be called yes, no, on, off or 007."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # keys <<


@dataclass(frozen=True)
class YoloSource:
    """One split: the images of folders and lists, and the labels beside them.

    The label file of `…/images/….jpg` is `…/labels/….txt`; where there is no such folder it lies beside the image.
    A row is `class cx cy w h`, or `class x1 y1 x2 y2 x3 y3 …` for a polygon, of which the box is taken; all but the
    class in 0..1 of the upright image. An image without a label file, or with an empty one, has no objects.
    root: the set's folder, which file names are relative to.
    keypoints: how many numbers of keypoints follow the box in each row, where data.yaml has a `kpt_shape`.
    """

    root: Path
    places: tuple[Path, ...]  # folders and text files with lists of images
    names: tuple[str, ...]
    keypoints: int = 0
    format: str = "yolo"

    @property
    def file(self) -> Path:
        return self.places[0]

    def image_folder(self, names: Sequence[str]) -> Path:
        return self.root

    def read(self, categories: Sequence[Category] | None = None, complain: OnProblem = refuse) -> dict[str, Any]:
        ids = ids_by_name(self.names, categories, first=0)
        images, annotations = [], []
        labels_of = cache(label_folder)
        for path in self._images(complain):
            size = _size(path, complain)
            images.append({"id": len(images) + 1, "file_name": _name(path, self.root)})
            if size is None:
                continue
            height, width = size
            images[-1] |= {"height": height, "width": width}
            labels = label_file(labels_of(path.parent), path.stem, "txt")
            for line, number, box in self._rows(labels, complain):
                x0, y0, x1, y1 = box
                bbox = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]
                annotations.append({
                    "id": len(annotations) + 1, "image_id": len(images), "category_id": ids[number], "bbox": bbox,
                    "area": max(0.0, bbox[2]) * max(0.0, bbox[3]), "iscrowd": 0, "where": f"{labels.name} line {line}",
                })  # fmt: skip
        listed = [{"id": number, "name": name} for number, name in zip(ids, self.names, strict=True)]
        return {"images": images, "annotations": annotations, "categories": listed}

    def _images(self, complain: OnProblem) -> list[Path]:
        found: list[Path] = []
        for place in self.places:
            if place.is_dir():
                found += sorted(path for path in _below(place) if is_image(path.relative_to(place)))
                continue
            for number, line in enumerate(_lines(place, complain), start=1):
                if not line.strip():
                    continue
                text = line.strip()
                # Lists hold paths relative to the list (./…), to data.yaml, or to where the tool ran: absolute ones.
                texts = dict.fromkeys((text, text.replace("\\", "/")))
                tried = [base / path for path in texts for base in (place.parent, self.root)]
                existing = next((candidate for candidate in tried if os.path.isfile(candidate)), None)
                if existing is None:
                    complain(
                        "image-missing", place, f"line {number}", f"names the image {line.strip()!r}, which is missing",
                        "add the file or remove the line",
                    )  # fmt: skip
                else:
                    found.append(existing)
        return found

    def _rows(self, path: Path, complain: OnProblem) -> Iterator[tuple[int, int, tuple[float, float, float, float]]]:
        """(line number, class, xyxy box in 0..1) of the good rows of a label file."""
        try:
            os.lstat(path)  # a link to nowhere is a fault
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return
        except OSError:
            pass  # that it cannot be read is told below
        for number, line in enumerate(_lines(path, complain), start=1):
            if not line.strip():
                continue
            try:
                label, box = read_row(line, len(self.names), self.keypoints)
            except ValueError as error:
                complain("label-row", path, f"line {number}", str(error), "correct or remove the row")
            else:
                yield number, label, box


def _below(folder: Path) -> Iterator[Path]:
    """All that lies below a folder. Raises UserError for one that may not be read: it would look empty."""

    def fail(error: OSError) -> NoReturn:
        raise unreadable(error.filename, error.strerror)

    seen: set[str] = set()  # links may lead back
    for head, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if (real := os.path.realpath(head)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(head, name) for name in (*folders, *names))


def _name(path: Path, folder: Path) -> str:
    """A path relative to a folder. Where it leads out of that, as it leads out of what a link to the folder means."""
    if path.is_relative_to(folder) and ".." not in (inside := path.relative_to(folder)).parts:
        return str(inside)
    return os.path.relpath(Path(os.path.realpath(path.parent), path.name), os.path.realpath(folder))


def read_row(line: str, classes: int, keypoints: int = 0) -> tuple[int, tuple[float, float, float, float]]:
    """Class and xyxy box in 0..1 of one row of a label file; ValueError says what is wrong with it.

    keypoints: the numbers that must follow `class cx cy w h`; there are no polygons where there are any.
    """
    parts = line.split()
    if keypoints and len(parts) != 5 + keypoints:
        raise ValueError(f"has {len(parts)} values instead of class cx cy w h and the {keypoints} that kpt_shape says")
    if not keypoints and len(parts) != 5 and (len(parts) < 7 or len(parts) % 2 == 0):
        raise ValueError(f"has {len(parts)} values instead of class cx cy w h (or class and a polygon's x y …)")
    try:
        values = [float(part) for part in parts]
    except ValueError:
        raise ValueError(f"has {line.strip()[:40]!r} instead of numbers") from None
    if not all(map(math.isfinite, values)):
        raise ValueError("has a value that is no finite number")
    label, *numbers = values[: len(values) - keypoints]
    if label != int(label) or not 0 <= label < classes:
        raise ValueError(f"has class {parts[0]}, but the classes are 0 to {classes - 1}")
    if min(numbers) < -SLACK or max(numbers) > 1 + SLACK:
        raise ValueError("has values outside 0..1 (they must be divided by the image's width and height)")
    if len(numbers) > 4:
        return int(label), (min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2]))
    cx, cy, w, h = numbers
    return int(label), (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)


def label_folder(images: Path) -> Path:
    """Where the label files of a folder's images are: the nearest `images` of the path is `labels`, in any case.

    The folder itself where that is no folder: a set may lie anywhere, also below folders called `images`.
    """
    for place, part in reversed(list(enumerate(images.parts))):
        for name in LABELS if part.lower() == "images" else ():
            folder = Path(*images.parts[:place], name, *images.parts[place + 1 :])
            refuse_unreadable(folder.parent, os.X_OK)
            if os.path.isdir(folder):
                return folder
    return images


def find_yaml(root: Path) -> Path | None:
    """The data.yaml of a set, where it has one; `root` itself where that is a YAML file."""
    if root.is_file():
        return root if root.suffix.lower() in (".yaml", ".yml") else None
    named = [root / name for name in YAML_NAMES if (root / name).is_file()]
    if named or not root.is_dir():
        return named[0] if named else None
    others = [path for path in root.iterdir() if path.suffix.lower() in (".yaml", ".yml") and not is_hidden(path.name)]
    return others[0] if len(others) == 1 and _may_be_set(others[0]) else None


def find_yolo(file: Path, split: str) -> YoloSource:
    """One split of the set that a data.yaml describes; `UserError` for a bad file or a split that it lacks."""
    content = read_yaml(file)
    names = _names(content.get("names"), content.get("nc"), file)
    aliases = split_aliases(split)
    key = next((name for name in aliases if content.get(name)), None)
    if key is None:
        raise UserError(
            f"{file}: no '{split}' split; it needs a key {' or '.join(aliases[:2])} with a folder of images"
        )
    value = content[key]
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str) for entry in values):
        raise UserError(f"{file}: '{key}' must be a folder, a text file, or a list of these")
    base = content.get("path")
    places = tuple(_place(file, base, entry, key) for entry in values)
    return YoloSource(file.parent, places, names, _keypoints(content.get("kpt_shape"), file))


def find_listed(root: Path, split: str) -> YoloSource | None:
    """One split of a set without data.yaml whose classes are listed in one of `CLASSES`; None where there is none.

    Images that lie in no folder of a split serve for any.
    """
    file = next((root / name for name in CLASSES if (root / name).is_file()), None)
    if file is None:
        return None
    folders = _split_folders(root)
    place = next((folders[name] for name in split_aliases(split) if name in folders), None)
    if place is None:
        if folders or names_other_split(root / "x", split):
            return None
        place = root / "images" if (root / "images").is_dir() else root
    if not any(is_image(path.relative_to(place)) for path in _below(place)):
        return None
    names: list[Any] = [line.strip() for line in "\n".join(_lines(file, refuse)).strip().splitlines()]
    return YoloSource(root, (place,), _names(names, None, file))


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders that say which split they are: images/train, train/images, obj_train_data, train; also Train2017."""
    words = {name for names in ALIASES for name in names}
    found: dict[str, Path] = {}
    for folder in (root / "images", root):
        refuse_unreadable(folder)
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            name = re.fullmatch(r"(?:obj_)?([a-z]+?)(?:_data)?\d*", path.name.lower())
            if name and name[1] in words and path.is_dir():
                found.setdefault(name[1], path / "images" if (path / "images").is_dir() else path)
    return found


def read_yaml(file: Path) -> dict[str, Any]:
    """The keys of a data.yaml, its scalars as text; `UserError` in one line for anything else."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8-sig"), _TextLoader)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; give a data.yaml that can be read") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid YAML ({' '.join(str(error).split())[:200]}); correct it") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: must hold the keys 'names', 'train' and 'val' of a YOLO set")
    return content


def _may_be_set(file: Path) -> bool:
    try:
        return "names" in read_yaml(file)
    except UserError:
        return False


def _names(names: Any, count: Any, file: Path) -> tuple[str, ...]:
    mend = "list the classes, as in names: [cat, dog] or {0: cat, 1: dog}"
    if isinstance(names, dict):
        if names.keys() != {str(number) for number in range(len(names))}:
            raise UserError(f"{file}: the keys of 'names' are not 0 to {len(names) - 1}; {mend}")
        names = [names[str(number)] for number in range(len(names))]
    if isinstance(names, str) and names:
        raise UserError(f"{file}: 'names' is {names[:80]!r}, which is no list; {mend}")
    if not isinstance(names, list) or not names:
        raise UserError(f"{file}: 'names' is missing or empty; {mend}")
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{file}: 'names' has an entry that is no text; {mend}")
    most, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise UserError(f"{file}: 'names': {most[:200]!r} stands there twice; give each class a name of its own")
    if _is_number(count) and int(count) != len(names):
        raise UserError(f"{file}: nc is {count} but 'names' has {len(names)} entries; make them agree")
    return tuple(names)


def _keypoints(shape: Any, file: Path) -> int:
    """Numbers of a row that are keypoints: `kpt_shape` is how many there are and how many numbers each has."""
    if not shape:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(_is_number(text) and int(text) for text in shape):
        raise UserError(
            f"{file}: 'kpt_shape' must be two whole numbers, as in [17, 3] for 17 keypoints of x, y, visible"
        )
    return int(shape[0]) * int(shape[1])


def _is_number(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[0-9]{1,9}", text) is not None


def _place(file: Path, base: Any, value: str, key: str) -> Path:
    """Where a split lies: relative to `path` or to the file; exports also write ../train/images for train/images.

    What is not there as it stands is looked for with / in place of Windows' separator.
    """
    own = file.parent
    roots = [own / base, Path(base)] if isinstance(base, str) and base else []
    tried = []
    for text in dict.fromkeys((value, value.replace("\\", "/"))):
        tried += [root / text for root in (*roots, own)]
        if text.startswith("../"):
            tried += [root / text.removeprefix("../") for root in (*roots, own)]
    for path in tried:
        if os.path.exists(path):  # unlike Path.exists, it takes any text
            return path
    place = str(tried[0])[:300]
    raise UserError(f"{file}: '{key}' is {value[:200]}, which is neither folder nor file ({place}); correct the path")


def _size(path: Path, complain: OnProblem) -> tuple[int, int] | None:
    try:
        return read_size(path)
    except UserError as error:
        what = str(error).removeprefix(f"{path}: ").rsplit("; ", 1)
        complain("image-unreadable", path, "", what[0], what[1] if len(what) > 1 else "replace or remove it")
    return None


def _lines(path: Path, complain: OnProblem) -> list[str]:
    if path.is_fifo():
        complain("label-unreadable", path, "", "is a pipe", "put a file there")
        return []
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        complain("label-unreadable", path, "", f"cannot be read ({error.strerror or error})", "make it readable")
    except UnicodeDecodeError:
        complain("label-unreadable", path, "", "is no UTF-8 text", "export the labels again")
    return []
