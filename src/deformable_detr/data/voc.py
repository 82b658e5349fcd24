"""Pascal VOC datasets: an XML file with pixel boxes per image."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from xml.sax.saxutils import unescape

from ..structures import Category
from ..utils.errors import UserError
from ..utils.files import open_regular, read_regular
from .discovery import SPLIT_ALIASES, ensure_readable, is_hidden, label_file, names_other_split, split_aliases
from .issues import Issue
from .labels import LabelTree
from .matching import match_names
from .named import NamedSource, rotated_boxes, rotated_extent, with_others
from .source import AnnotationCache, ParsedAnnotations, read_lines

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element


FOLDERS = ("jpegimages", "images", "data", "annotations", "labels")
FRACTIONS = 0.05  # share of boxes with fractional corners; the published VOC2011 and later have a few


@dataclass(frozen=True)
class VocSource(NamedSource):
    """One split of a Pascal VOC dataset; see `NamedSource`.

    Layouts: `JPEGImages/` (or `images/`), `Annotations/` and the list `ImageSets/Main/<split>.txt`; or both folders
    without a list; or one folder with everything. In the published datasets, pixels are counted from 1 and a box
    includes both ends; most tools write coordinates that can be used as they are. See `pixel_origin`. Difficult objects
    count like others.

    Attributes:
        file: The list, or the folder of the images.
        image_root: Folder of the images.
        annotations: Folder of the XML files.
        origin: Number of the first pixel, 0 or 1. If omitted, the files decide.
    """

    file: Path
    image_root: Path
    annotations: Path
    origin: int | None = field(default=None, kw_only=True)
    format: ClassVar[str] = "voc"

    @property
    def image_trees(self) -> tuple[Path, ...]:
        return (self.image_root,)

    @property
    def has_list(self) -> bool:
        """Whether a list names the images."""
        return self.file != self.image_root

    def to_coco(
        self, parsed: ParsedAnnotations, categories: Sequence[Category] | None, cache: AnnotationCache
    ) -> dict[str, Any]:
        """Return the COCO dict, with pixels counted from 0."""
        if self._choose_origin(parsed, cache)[0]:
            shifted = [
                item | {"bbox": [x - 1, y - 1, w + 1, h + 1]}
                for item in parsed.content["objects"]
                for x, y, w, h in (item["bbox"],)
            ]
            parsed = replace(parsed, content=parsed.content | {"objects": shifted})
        return super().to_coco(parsed, categories, cache)

    def issues(self, parsed: ParsedAnnotations, cache: AnnotationCache) -> Sequence[Issue]:
        """Return the issues of the files, and which pixel origin was chosen."""
        if not parsed.content["objects"]:
            return parsed.issues
        origin, reason, conflict = self._choose_origin(parsed, cache)
        message = f"counts pixels from {origin}: {reason}"
        hint = f"check some boxes; if they are off by a pixel, set data.voc_origin={1 - origin}" if conflict else ""
        code = "pixel-origin-unclear" if conflict else "pixel-origin"
        return [*parsed.issues, Issue(code, self.file, "", message, hint)]

    def _choose_origin(self, parsed: ParsedAnnotations, cache: AnnotationCache) -> tuple[int, str, bool]:
        """Return the pixel origin of the whole dataset; see `pixel_origin`."""
        if self.origin is not None:
            return self.origin, "data.voc_origin is set", False
        evidence = Counter(parsed.content["evidence"])
        for source in self.others:
            with suppress(UserError):  # reported when that split itself is read
                evidence.update(cache.parse(source).content["evidence"])
        return pixel_origin(evidence, self.has_list)

    def parse(self, masks: bool = False) -> ParsedAnnotations:
        """Read the list and the XML files, which have no masks."""
        issues: list[Issue] = []
        images: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        evidence: Counter[str] = Counter()
        for path, name in self._files(issues):
            record: dict[str, Any] = {"id": len(images) + 1, "file_name": name}
            images.append(record)
            root = parse_xml(path, issues, "annotation")
            if root is None:
                continue
            height, width = (_number(root, f"size/{side}") or 0 for side in ("height", "width"))
            if height > 0 and width > 0:
                record |= {"height": int(height), "width": int(width)}
            evidence[_tag(root)] += 1
            for index, element in enumerate(root.iter("object")):
                if (item := self._object(path, index, element, issues)) is not None:
                    evidence.update(_box_evidence(item["bbox"]))
                    if degrees := _rotation(element):
                        item["bbox"] = rotated_extent(item["bbox"], degrees)
                        evidence["rotated"] += 1
                    objects.append({"image_id": record["id"], **item})
        if count := evidence["rotated"]:
            issues.append(rotated_boxes(count, self.file))
        return ParsedAnnotations({"images": images, "objects": objects, "evidence": evidence}, issues)

    def _files(self, issues: list[Issue]) -> list[tuple[Path, str]]:
        """Return the XML file and the image of each record."""
        tree = LabelTree.scan(self.image_root, self.annotations, ".xml", self._xml_of, without=self._other_splits())
        names: dict[str, Path] = {}
        stems: dict[str, str] = {}
        for path, name in sorted((path, str(path.relative_to(self.image_root))) for path in tree.images):
            if (first := stems.setdefault(os.path.splitext(name)[0], name)) != name:
                message = f"has the name of {first} but another suffix; both would have one XML file"
                issues.append(Issue("image-record", path, "", message, "rename or remove it"))
            else:
                names[name] = path
        listed = self._listed(names, stems, tree.unread, issues) if self.has_list else list(names)
        labels = tree.assign([names[name] for name in listed], count_objects, issues, self.has_list, _filename)
        for name in listed:
            if self.has_list and not (xml := labels[names[name]]).is_file():
                hint = f"add it or remove {os.path.splitext(name)[0]} from {self.file.name}"
                issues.append(Issue("label-unreadable", xml, "", "is missing", hint))
        return [(labels[names[name]], name) for name in listed]

    def _xml_of(self, image: Path) -> Path:
        return label_file(self.annotations / image.parent.relative_to(self.image_root), image.stem, "xml")

    def _other_splits(self) -> Collection[str]:
        """Return the names of folders to leave out: with everything in one folder, its split folders are apart."""
        return {name for names in SPLIT_ALIASES for name in names} if self.image_root == self.annotations else ()

    def _listed(
        self, names: Mapping[str, Path], stems: Mapping[str, str], unread: Mapping[Path, Path], issues: list[Issue]
    ) -> list[str]:
        """Return the images that the list names, with or without suffix; see `match_names` for other spellings."""
        lines: dict[str, int] = {}
        for number, line in enumerate(read_lines(self.file), start=1):
            if text := line.strip():
                lines.setdefault(text, number)
        exact = {text: text if text in names else stems[text] for text in lines if text in names or text in stems}
        similar = match_names(lines.keys() - exact, names.keys() - set(exact.values()))
        other_formats = {os.path.splitext(path.relative_to(self.image_root))[0]: path for path in unread}
        for text, number in lines.items():
            if text in exact:
                continue
            message, code, hint, objects = f"{self.image_root} has no such image", "image-missing", "", 0
            if text in similar:
                message, code = f"{message}: {similar[text]!r} is read instead", "image-name"
            elif path := other_formats.get(text) or other_formats.get(os.path.splitext(text)[0]):
                message, hint = f"{path.name} has a format that is not read", "convert it to JPEG or PNG"
                objects = count_objects(unread[path])
            message = f"names {text!r}, but {message}"
            issues.append(Issue(code, self.file, f"line {number}", message, hint, objects=objects))
        return list(dict.fromkeys(name for text in lines if (name := exact.get(text) or similar.get(text))))

    def _object(self, path: Path, index: int, element: Element, issues: list[Issue]) -> dict[str, Any] | None:
        name = (element.findtext("name") or "").strip()
        corners = [_number(element, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        if not name or any(value is None for value in corners):
            record = f"object[{index}]" + (f" ({name!r})" if name else "")
            message = "has no bndbox of four numbers (xmin, ymin, xmax, ymax)" if name else "has no name"
            issues.append(Issue("label-row", path, record, message, "correct or remove the object", objects=1))
            return None
        x0, y0, x1, y1 = (value for value in corners if value is not None)
        if x0 > x1 or y0 > y1:
            message = f"has corners in another order ({x0:g}, {y0:g}, {x1:g}, {y1:g}); the box between them is used"
            issues.append(Issue("box-swapped", path, f"object[{index}] ({name!r})", message))
            (x0, x1), (y0, y1) = sorted((x0, x1)), sorted((y0, y1))
        bbox = [x0, y0, x1 - x0, y1 - y0]
        return {"class": name, "bbox": bbox, "where": f"{path.name} object[{index}]"}


def pixel_origin(evidence: Mapping[str, int], has_list: bool) -> tuple[int, str, bool]:
    """Decide whether pixels count from 1, as in the published datasets, or coordinates are used as they are.

    CVAT, Datumaro, LabelImg, FiftyOne and others write Pascal VOC files whose corners need no change. Their
    `<source><database>` does not name VOC. A corner at 0 or between pixels contradicts a count from 1.

    Args:
        evidence: Numbers of files whose `<database>` is 'voc', 'other' or 'none', and of 'boxes' and of those with a
            corner at 'zero' or a 'fraction'.
        has_list: Whether a list in `ImageSets` names the images.

    Returns:
        The origin, the reason, and whether the evidence conflicts.
    """
    zeros, fractions, boxes = (evidence.get(key, 0) for key in ("zero", "fraction", "boxes"))
    voc, other = (evidence.get(tag, 0) for tag in ("voc", "other"))
    corners = f"{zeros} of {boxes} boxes start at 0" if zeros else f"{fractions} of {boxes} boxes have fractions"
    if voc > other:
        reason = "<database> names Pascal VOC"
        if zeros or fractions:
            return int(not zeros and fractions <= FRACTIONS * boxes), f"{reason}, but {corners}", True
        return 1, f"{reason}{f' in {voc} of {voc + other} files' if other else ''}", other > 0
    if zeros or fractions:
        return 0, corners, False
    if other:
        reason = "<database> does not name Pascal VOC"
        return 0, f"{reason}{f' in {other} of {voc + other} files' if voc else ''}", voc > 0
    return (
        int(has_list),
        f"no file has a <source>, and the dataset has {'a' if has_list else 'no'} list of images",
        False,
    )


def find_voc(root: Path, split: str, splits: Sequence[str], origin: int | None = None) -> NamedSource | None:
    """Find one split of a VOC dataset, None if the folder is not one; the classes of all `splits` count.

    Raises:
        UserError: It is a VOC dataset without this split.
    """
    sources: list[VocSource | None] = [_find_split(root, split)]
    for name in splits:
        with suppress(UserError):  # no such split
            sources.append(_find_split(root, name))
    return with_others([source and replace(source, origin=origin) for source in sources])


def _find_split(root: Path, split: str) -> VocSource | None:
    for folder in (root, root / "JPEGImages", root / "Annotations"):
        ensure_readable(folder)
    if not root.is_dir():
        return None
    aliases = split_aliases(split)
    pair = _image_and_xml_folders(root)
    lists = root / "ImageSets" / "Main"
    if pair and (lists.is_dir() or (pair[0].name == "JPEGImages" and not _has_xml(pair[1]))):
        stems = {file.stem.lower(): file for file in sorted(lists.glob("*.txt")) if file.is_file()}
        names = aliases
        if stems.keys().isdisjoint(name for names in SPLIT_ALIASES for name in names):
            names = (*aliases, "default", "trainval")  # CVAT's and VOC's names of a dataset without splits
        if name := next((name for name in names if name in stems), None):
            return VocSource(stems[name], *pair)
        raise UserError(f"{root}: no '{split}' split; write {lists / f'{aliases[0]}.txt'}, one image name per line")
    folders = [root / name for name in aliases]
    if not names_other_split(root / "x", split):
        folders.append(root)
    top = _image_and_xml_folders(root, aliases)
    pairs = [(top[0] / name, top[1] / name) for name in aliases if top and (top[0] / name).is_dir()]
    for folder in folders:
        for images, labels in (*pairs, *filter(None, (_image_and_xml_folders(folder), (folder, folder)))):
            if _has_xml(labels):
                return VocSource(images, images, labels)
    return None


def _image_and_xml_folders(folder: Path, inside: Sequence[str] = ()) -> tuple[Path, Path] | None:
    """Find the folders of images and XML files, or of folders with such, in a folder; names in any case."""
    if not folder.is_dir():
        return None
    ensure_readable(folder)
    with os.scandir(folder) as entries:
        named = [entry for entry in entries if entry.name.lower() in FOLDERS and entry.is_dir()]
    folders = {entry.name.lower(): folder / entry.name for entry in named}
    images = next((folders[name] for name in ("jpegimages", "images", "data") if name in folders), None)
    labels = folders.get("annotations")
    if labels is None and (other := folders.get("labels")) and any(_has_xml(other / name) for name in ("", *inside)):
        labels = other  # FiftyOne: data and labels
    return (images, labels) if images and labels else None


def parse_xml(path: Path, issues: list[Issue], tag: str) -> Element | None:
    """Parse an XML file whose root has this tag. Entities are rejected: they could fill the memory."""
    from xml.etree.ElementTree import ParseError

    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import parse

    if not os.path.lexists(path):
        return None  # an image without objects
    try:
        with open_regular(path) as file:
            root = parse(file, forbid_dtd=True).getroot()
        if root is not None and root.tag == tag:
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


def count_objects(path: Path) -> int:
    """Return the number of objects in an XML file, valid or not."""
    with suppress(OSError):
        return len(re.findall(rb"<object[\s>]", read_regular(path)))
    return 0


def _filename(path: Path) -> str:
    """Return the name of the image in an XML file."""
    with suppress(OSError):
        match = re.search(rb"<filename>([^<]*)</filename>", read_regular(path))
        return unescape(match[1].decode(errors="replace")) if match else ""
    return ""


def _tag(root: Element) -> str:
    """Return what `<database>` says about the origin of a file: 'voc', 'other' or 'none'."""
    if root.find("source") is None and root.find("database") is None:  # labelme2voc writes no <source> around it
        return "none"
    # <annotation> in <source> does not count: Supervisely writes "PASCAL VOC" there, and pixels from 0.
    text = f"{root.findtext('source/database')} {root.findtext('database')}"
    return "voc" if re.search(r"pascal|\bVOC|VOC\d", text, re.IGNORECASE) else "other"


def _rotation(element: Element) -> float:
    """Return the degrees in CVAT's attribute 'rotation' of an object; its box is the one before the rotation."""
    for attribute in element.iterfind("attributes/attribute"):
        if attribute.findtext("name") == "rotation":
            return _number(attribute, "value") or 0
    return 0


def _box_evidence(bbox: Sequence[float]) -> dict[str, bool]:
    """Tell whether an xywh box, with corners as in the file, has a corner at 0 or between pixels."""
    x, y, w, h = bbox
    return {"boxes": True, "zero": min(x, y, x + w, y + h) <= 0, "fraction": not all(v % 1 == 0 for v in bbox)}


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
