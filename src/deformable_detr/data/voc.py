"""Pascal VOC sets: an XML file with pixel boxes for each image."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..structures import Category
from ..utils.errors import UserError
from .discovery import ALIASES, is_hidden, is_image, label_file, names_other_split, refuse_unreadable, split_aliases
from .problems import OnProblem, ids_by_name, ignore, refuse

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_FLAG = re.compile(r"\s+(-1|0|1)$")  # whether a class is in the image: no, only difficult ones, yes


@dataclass(frozen=True)
class VocSource:
    """One split: `JPEGImages/` (or `images/`), `Annotations/` and the list `ImageSets/Main/<split>.txt`; or these two
    folders, or one with all of it.

    file: the list, or the folder of the images. Where there is a list, pixels are counted from 1 and both ends of a box
    belong to it, as in the published sets; else coordinates are taken as they are. Objects marked difficult are objects
    like any others. Ids are numbers from 1 in the order of the names, or those of the model's classes of these names.
    others: the set's other splits, whose classes are listed too: the format has no list of its own.
    """

    file: Path
    images: Path
    annotations: Path
    others: tuple[VocSource, ...] = ()
    format: str = "voc"

    @property
    def listed(self) -> bool:
        """Whether a list says which images there are."""
        return self.file != self.images

    def image_folder(self, names: Sequence[str]) -> Path:
        return self.images

    def read(self, categories: Sequence[Category] | None = None, complain: OnProblem = refuse) -> dict[str, Any]:
        images, objects = self._contents(complain)
        own = {record["name"] for record in objects}
        if categories is None:
            own.update(*(source.class_names() for source in self.others))
        if not own and categories is None:
            raise UserError(f"{self.file}: no object in any of its XML files, so there is no class; label some first")
        names = sorted(own)
        ids = dict(zip(names, ids_by_name(names, categories, first=1), strict=True))
        annotations = [
            {
                "id": number, "image_id": record["image_id"], "category_id": ids[record["name"]],
                "bbox": record["bbox"], "area": max(0.0, record["bbox"][2]) * max(0.0, record["bbox"][3]),
                "iscrowd": 0, "where": record["where"],
            }
            for number, record in enumerate(objects, start=1)
        ]  # fmt: skip
        listed = [{"id": ids[name], "name": name} for name in names]
        if categories is not None:
            listed += [{"id": c.id, "name": c.name} for c in categories if c.name not in ids]
        return {"images": images, "annotations": annotations, "categories": listed}

    def class_names(self) -> set[str]:
        """Those of the split's objects; what cannot be read is left to whoever reads the split itself."""
        try:
            return {record["name"] for record in self._contents(ignore)[1]}
        except UserError:
            return set()

    def _contents(self, complain: OnProblem) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Images, and objects with the names of their classes."""
        images: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        for path, names in self._files(complain):
            root = _parsed(path, complain)
            if (own := _labeled(path, names, root, complain)) is None:
                continue
            record: dict[str, Any] = {"id": len(images) + 1, "file_name": own}
            images.append(record)
            if not self.listed:  # the others have no XML file
                others = [name for name in names if name != own]
                images += [{"id": number, "file_name": name} for number, name in enumerate(others, len(images) + 1)]
            if root is None:
                continue
            height, width = (_number(root, f"size/{side}") or 0 for side in ("height", "width"))
            if height > 0 and width > 0:
                record |= {"height": int(height), "width": int(width)}
            for place, element in enumerate(root.iter("object")):
                if (found := self._object(path, place, element, complain)) is not None:
                    objects.append({"image_id": record["id"], **found})
        return images, objects

    def _files(self, complain: OnProblem) -> list[tuple[Path, list[str]]]:
        """XML file and image of each record of the split; several images where they differ in their endings alone."""
        names: dict[str, list[str]] = {}
        for name in sorted(os.listdir(self.images)):
            if is_image(name):
                names.setdefault(Path(name).stem, []).append(name)
        found: dict[tuple[str, ...], tuple[Path, list[str]]] = {}
        for record, text in self._records(names):
            stem, images = _listed(text, names) if self.listed else (text, names.get(text, []))
            if not images:
                complain(
                    "image-missing", self.file, record, f"names {text!r}, of which no image is in {self.images}",
                    "add the file or remove the record",
                )  # fmt: skip
                continue
            if tuple(images) in found:  # the first of lines that name the same image counts
                continue
            path = label_file(self.annotations, stem, "xml")
            if self.listed and not path.is_file():
                complain("label-unreadable", path, "", "is missing", f"add it or remove {stem} from {self.file.name}")
            found[tuple(images)] = path, images
        return list(found.values())

    def _records(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """(where it is said, what is said) of the split's images: lines of its list, or names without ending."""
        if not self.listed:
            own = {Path(name).stem for name in os.listdir(self.annotations) if _is_xml(name)}
            return [(f"{stem}.xml", stem) for stem in sorted(own.union(names))]
        try:
            lines = self.file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.file}: cannot be read as text ({error}); write one image name a line") from None
        return [(f"line {number}", line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]

    def _object(self, path: Path, place: int, element: Element, complain: OnProblem) -> dict[str, Any] | None:
        name = (element.findtext("name") or "").strip()
        record = f"object[{place}]" + (f" ({name!r})" if name else "")
        corners = [_number(element, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        if not name or any(value is None for value in corners):
            what = "has no bndbox of four numbers (xmin, ymin, xmax, ymax)" if name else "has no name"
            complain("label-row", path, record, what, "correct or remove the object")
            return None
        x0, y0, x1, y1 = (value for value in corners if value is not None)
        shift = 1 if self.listed else 0
        bbox = [x0 - shift, y0 - shift, x1 - x0 + shift, y1 - y0 + shift]
        return {"name": name, "bbox": bbox, "where": f"{path.name} object[{place}]"}


def find_voc(root: Path, split: str, splits: Sequence[str] = ("train", "val", "test")) -> VocSource | None:
    """One split of a VOC set; None where the folder is no such set. splits: all that there may be.

    Raises `UserError` where it is one and lacks the split.
    """
    found = _find_split(root, split)
    if found is None:
        return None
    others: dict[Path, VocSource] = {}
    for name in splits:
        try:
            other = _find_split(root, name)
        except UserError:  # no such split
            continue
        if other is not None and other.file != found.file:
            others[other.file] = other
    return replace(found, others=tuple(others.values()))


def _find_split(root: Path, split: str) -> VocSource | None:
    for folder in (root, root / "JPEGImages", root / "Annotations"):
        refuse_unreadable(folder)
    if not root.is_dir():
        return None
    aliases = split_aliases(split)
    pair = _pair(root)
    lists = root / "ImageSets" / "Main"
    if pair and (lists.is_dir() or (pair[0].name == "JPEGImages" and not _has_xml(pair[1]))):
        listed = {file.stem for file in lists.glob("*.txt") if file.is_file()}
        wanted = aliases
        if listed.isdisjoint(name for names in ALIASES for name in names):
            wanted = (*aliases, "default", "trainval")  # CVAT's name of a set that is not divided, and VOC's
        if found := next((name for name in wanted if name in listed), None):
            return VocSource(lists / f"{found}.txt", *pair)
        raise UserError(f"{root}: no '{split}' split; it needs {lists / f'{aliases[0]}.txt'}, an image name a line")
    folders = [root / name for name in aliases]
    if not names_other_split(root / "x", split):
        folders.append(root)
    for folder in folders:
        for images, labels in filter(None, (_pair(folder), (folder, folder))):
            if _has_xml(labels):
                return VocSource(images, images, labels)
    return None


def _pair(folder: Path) -> tuple[Path, Path] | None:
    """The folders of the images and of their XML files in one, in any case."""
    if not folder.is_dir():
        return None
    refuse_unreadable(folder)
    found: dict[str, Path] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if (name := entry.name.lower()) in ("jpegimages", "images", "annotations") and entry.is_dir():
                found[name] = folder / entry.name
    images = found.get("jpegimages") or found.get("images")
    return (images, found["annotations"]) if images and "annotations" in found else None


def _listed(line: str, names: Mapping[str, list[str]]) -> tuple[str, list[str]]:
    """Name without ending, and images, of a list's line: `a`, `a.jpg`, or with the flag of a class's list `a -1`."""
    for text in (line, _FLAG.sub("", line)):
        if text in names:
            return text, names[text]
        if text in names.get(stem := Path(text).stem, ()):
            return stem, [text]
    return line, []


def _labeled(path: Path, names: Sequence[str], root: Element | None, complain: OnProblem) -> str | None:
    """Which of the images whose names differ in their endings alone an XML file is about."""
    if len(names) == 1 or root is None:
        return names[0]
    named = re.split(r"[/\\]", root.findtext("filename") or "")[-1].strip()
    if named in names:
        return named
    complain("image-record", path, "", f"may be of {' or '.join(names)}", "name the image in its <filename>")
    return None


def _parsed(path: Path, complain: OnProblem) -> Element | None:
    """The root element; entities, which can be made to fill the memory or to read other files, are refused."""
    from xml.etree.ElementTree import ParseError

    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import parse

    if not os.path.lexists(path):
        return None  # an image without objects
    try:
        if path.is_fifo():
            raise OSError("it is a pipe")
        root = parse(path, forbid_dtd=True).getroot()
        if root is not None and root.tag == "annotation":
            return root
        what = f"is no Pascal VOC annotation (its root is <{root.tag[:40] if root is not None else ''}>)"
    except DefusedXmlException:
        what = "declares a document type or entities, which is not safe to read"
    except (ParseError, ValueError, LookupError) as error:
        what = f"is not valid XML ({' '.join(str(error).split())})"
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
    complain("label-unreadable", path, "", what, "export the annotation again")
    return None


def _number(element: Element, key: str) -> float | None:
    try:
        value = float(element.findtext(key) or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _has_xml(folder: Path) -> bool:
    refuse_unreadable(folder)
    return folder.is_dir() and any(map(_is_xml, os.listdir(folder)))


def _is_xml(name: str) -> bool:
    return name.lower().endswith(".xml") and not is_hidden(name)
