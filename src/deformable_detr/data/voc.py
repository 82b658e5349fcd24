"""Pascal VOC datasets: an XML file with pixel boxes per image."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..structures import Category
from ..utils.errors import UserError
from .discovery import SPLIT_ALIASES, ensure_readable, is_hidden, is_image, label_file, names_other_split, split_aliases
from .issues import Issue
from .source import AnnotationCache, ParsedAnnotations, Source, category_ids_by_name, coco_dict, read_lines

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element


@dataclass(frozen=True)
class VocSource(Source):
    """One split of a Pascal VOC dataset; see `Source`.

    Layouts: `JPEGImages/` (or `images/`), `Annotations/` and the list `ImageSets/Main/<split>.txt`; or both folders
    without a list; or one folder with everything. With a list, pixels are counted from 1 and a box includes both ends,
    as in the published datasets; otherwise coordinates are used as they are. Difficult objects count like others.
    Category ids are numbers from 1 in the order of the names, or those of the model's classes with these names.

    Attributes:
        file: The list, or the folder of the images.
        image_root: Folder of the images.
        annotations: Folder of the XML files.
        others: The dataset's other splits; the format has no list of classes, so theirs are listed too.
    """

    file: Path
    image_root: Path
    annotations: Path
    others: tuple[VocSource, ...] = field(default=(), compare=False)
    format: ClassVar[str] = "voc"

    @property
    def has_list(self) -> bool:
        """Whether a list names the images."""
        return self.file != self.image_root

    def to_coco(
        self, parsed: ParsedAnnotations, categories: Sequence[Category] | None, cache: AnnotationCache
    ) -> dict[str, Any]:
        """Return the COCO dict; without `categories`, it lists the classes of all splits."""
        names = {item["class"] for item in parsed.content["objects"]}
        if categories is None:
            names.update(*(source.class_names(cache) for source in self.others))
        if not names and categories is None:
            raise UserError(f"{self.file}: none of its XML files has an object, so there is no class; label some first")
        ordered = sorted(names)
        ids = dict(zip(ordered, category_ids_by_name(ordered, categories, first=1), strict=True))
        listed = [{"id": ids[name], "name": name} for name in ordered]
        listed += [{"id": c.id, "name": c.name} for c in categories or () if c.name not in ids]
        return coco_dict(parsed, ids, listed)

    def class_names(self, cache: AnnotationCache) -> set[str]:
        """Return the classes of the split's objects; issues are reported when the split itself is read."""
        try:
            return {item["class"] for item in cache.parse(self).content["objects"]}
        except UserError:
            return set()

    def parse(self) -> ParsedAnnotations:
        """Read the list and the XML files."""
        issues: list[Issue] = []
        images: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        for path, name in self._files(issues):
            record: dict[str, Any] = {"id": len(images) + 1, "file_name": name}
            images.append(record)
            root = _parse_xml(path, issues)
            if root is None:
                continue
            height, width = (_number(root, f"size/{side}") or 0 for side in ("height", "width"))
            if height > 0 and width > 0:
                record |= {"height": int(height), "width": int(width)}
            for index, element in enumerate(root.iter("object")):
                if (item := self._object(path, index, element, issues)) is not None:
                    objects.append({"image_id": record["id"], **item})
        return ParsedAnnotations({"images": images, "objects": objects}, issues)

    def _files(self, issues: list[Issue]) -> list[tuple[Path, str]]:
        """Return the XML file and the image of each record."""
        names: dict[str, str] = {}
        for name in sorted(filter(is_image, os.listdir(self.image_root))):
            if (first := names.setdefault(Path(name).stem, name)) != name:
                message = f"has the name of {first} but another suffix; both would have one XML file"
                issues.append(Issue("image-record", self.image_root / name, "", message, "rename or remove it"))
        files: dict[str, tuple[Path, str]] = {}
        for record, text in self._entries(names):
            stem = text if text in names else Path(text).stem
            if stem not in names or text not in (stem, names[stem]):
                message = f"names {text!r}, but {self.image_root} has no such image"
                issues.append(Issue("image-missing", self.file, record, message))
                continue
            path = label_file(self.annotations, stem, "xml")
            if self.has_list and not path.is_file() and stem not in files:
                hint = f"add it or remove {stem} from {self.file.name}"
                issues.append(Issue("label-unreadable", path, "", "is missing", hint))
            files.setdefault(stem, (path, names[stem]))
        return list(files.values())

    def _entries(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """Return (place, text) of the split's images: lines of its list, or names without suffix."""
        if not self.has_list:
            stems = {Path(name).stem for name in os.listdir(self.annotations) if _is_xml(name)}
            return [(f"{stem}.xml", stem) for stem in sorted(stems.union(names))]
        lines = enumerate(read_lines(self.file), start=1)
        return [(f"line {number}", line.strip()) for number, line in lines if line.strip()]

    def _object(self, path: Path, index: int, element: Element, issues: list[Issue]) -> dict[str, Any] | None:
        name = (element.findtext("name") or "").strip()
        corners = [_number(element, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        if not name or any(value is None for value in corners):
            record = f"object[{index}]" + (f" ({name!r})" if name else "")
            message = "has no bndbox of four numbers (xmin, ymin, xmax, ymax)" if name else "has no name"
            issues.append(Issue("label-row", path, record, message, "correct or remove the object"))
            return None
        x0, y0, x1, y1 = (value for value in corners if value is not None)
        offset = 1 if self.has_list else 0
        bbox = [x0 - offset, y0 - offset, x1 - x0 + offset, y1 - y0 + offset]
        return {"class": name, "bbox": bbox, "where": f"{path.name} object[{index}]"}


def find_voc(root: Path, split: str, splits: Sequence[str]) -> VocSource | None:
    """Find one split of a VOC dataset, None if the folder is not one; the classes of all `splits` count.

    Raises:
        UserError: It is a VOC dataset without this split.
    """
    source = _find_split(root, split)
    if source is None:
        return None
    others: dict[Path, VocSource] = {}
    for name in splits:
        try:
            other = _find_split(root, name)
        except UserError:  # no such split
            continue
        if other is not None and other.file != source.file:
            others[other.file] = other
    return replace(source, others=tuple(others.values()))


def _find_split(root: Path, split: str) -> VocSource | None:
    for folder in (root, root / "JPEGImages", root / "Annotations"):
        ensure_readable(folder)
    if not root.is_dir():
        return None
    aliases = split_aliases(split)
    pair = _image_and_xml_folders(root)
    lists = root / "ImageSets" / "Main"
    if pair and (lists.is_dir() or (pair[0].name == "JPEGImages" and not _has_xml(pair[1]))):
        stems = {file.stem for file in lists.glob("*.txt") if file.is_file()}
        names = aliases
        if stems.isdisjoint(name for names in SPLIT_ALIASES for name in names):
            names = (*aliases, "default", "trainval")  # CVAT's and VOC's names of a dataset without splits
        if name := next((name for name in names if name in stems), None):
            return VocSource(lists / f"{name}.txt", *pair)
        raise UserError(f"{root}: no '{split}' split; write {lists / f'{aliases[0]}.txt'}, one image name per line")
    folders = [root / name for name in aliases]
    if not names_other_split(root / "x", split):
        folders.append(root)
    for folder in folders:
        for images, labels in filter(None, (_image_and_xml_folders(folder), (folder, folder))):
            if _has_xml(labels):
                return VocSource(images, images, labels)
    return None


def _image_and_xml_folders(folder: Path) -> tuple[Path, Path] | None:
    """Find the folders of images and XML files in a folder, in any case."""
    if not folder.is_dir():
        return None
    ensure_readable(folder)
    folders: dict[str, Path] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if (name := entry.name.lower()) in ("jpegimages", "images", "annotations") and entry.is_dir():
                folders[name] = folder / entry.name
    images = folders.get("jpegimages") or folders.get("images")
    return (images, folders["annotations"]) if images and "annotations" in folders else None


def _parse_xml(path: Path, issues: list[Issue]) -> Element | None:
    """Parse an XML file. Entities are rejected: they can fill the memory or read other files."""
    from xml.etree.ElementTree import ParseError

    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import parse

    if not os.path.lexists(path):
        return None  # an image without objects
    try:
        root = parse(path, forbid_dtd=True).getroot()
        if root is not None and root.tag == "annotation":
            return root
        message = f"is not a Pascal VOC annotation (its root is <{root.tag[:40] if root is not None else ''}>)"
    except DefusedXmlException:
        message = "declares a document type or entities, which are unsafe"
    except (ParseError, ValueError, LookupError) as error:
        message = f"is not valid XML ({' '.join(str(error).split())})"
    except OSError as error:
        message = f"cannot be read ({error.strerror or error})"
    issues.append(Issue("label-unreadable", path, "", message))
    return None


def _number(element: Element, key: str) -> float | None:
    try:
        value = float(element.findtext(key) or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _has_xml(folder: Path) -> bool:
    ensure_readable(folder)
    return folder.is_dir() and any(map(_is_xml, os.listdir(folder)))


def _is_xml(name: str) -> bool:
    return name.lower().endswith(".xml") and not is_hidden(name)
