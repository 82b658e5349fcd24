"""Formats that are not read: recognize them by a few bytes, and say how to convert them."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ..utils.errors import UserError
from .annotation_files import head_of
from .discovery import is_hidden, is_image, walk_folder

MAX_FILES = 2000  # files that are looked at
MAX_PER_SUFFIX = 3  # files per folder and suffix of which the first bytes are read
DATUMARO = "convert it to COCO, for example with datum convert -if {} -f coco"

# What files are named or contain → (format, way out). The first match counts.
_SUFFIXES = {
    ".parquet": (
        "a Hugging Face dataset in Parquet",
        "save its images as files and its boxes as metadata.jsonl or COCO",
    ),
    ".arrow": ("a Hugging Face dataset in Arrow", "save its images as files and its boxes as metadata.jsonl or COCO"),
    ".tfrecord": ("TFRecord", DATUMARO.format("tf_detection_api")),
    ".tfrecords": ("TFRecord", DATUMARO.format("tf_detection_api")),
    ".record": ("TFRecord", DATUMARO.format("tf_detection_api")),
    ".vott": ("a VoTT project", "export it as Pascal VOC"),
}
_FLOAT = r"-?\d+(?:\.\d+)?"
_CONTENTS = [
    (".json", r'"_via_|"shape_attributes"', "a VIA project", "export it as COCO (Annotation > Export Annotations)"),
    (".csv", r"region_shape_attributes", "a VIA table", "export it as COCO (Annotation > Export Annotations)"),
    (".csv", r"(?i)imageid.*labelname.*xmin", "an Open Images table", DATUMARO.format("open_images")),
    (".csv", r"(?i)^file_name,", "a Hugging Face metadata.csv", "write metadata.jsonl or COCO"),
    (".json", r'"classTitle"|"classId"[^}]*"geometryType"', "Supervisely", "export it as COCO"),
    (".json", r'"dm_format_version"|"label":\s*{\s*"labels"', "Datumaro's JSON", DATUMARO.format("datumaro")),
    (".json", r'"asset"\s*:\s*{[^}]*"format"', "a VoTT asset", "export the project as Pascal VOC"),
    (".json", r'"rectanglelabels"|"completed_by"|"from_name"', "Label Studio's own JSON", "export it as COCO or YOLO"),
    (".json", r'"box2d"', "BDD100K", "convert it to COCO"),
    (".json", r'"bbox"[^]]*\][^]]*"score"|"score"[^]]*"bbox"', "COCO results", "give the annotations instead"),
    (".txt", rf"\A\S+ {_FLOAT} -?\d+ {_FLOAT}(?: {_FLOAT}){{11}}(?: {_FLOAT})?\s*$", "KITTI", DATUMARO.format("kitti")),
    (
        ".txt", rf"\A[^\W\d][^\n]*?(?: {_FLOAT}){{4}}\s*$", "class names and pixels, as the OIDv4 toolkit writes them",
        "write YOLO rows (number of the class, then cx cy w h in 0..1) and a data.yaml, or COCO",
    ),
    (
        ".txt", rf"\A\d+(?: {_FLOAT}){{4,}}\s*$", "YOLO rows without class names",
        "add a data.yaml or classes.txt with the names",
    ),
    (".json", r'"bounding_box"\s*:', "FiftyOne's own JSON", "export it as fiftyone.types.COCODetectionDataset"),
    (
        ".xml", r"<annotation[\s>]", "Pascal VOC in another layout",
        "put the XML files beside their images, in a folder per split",
    ),
]  # fmt: skip


def unread_format(root: Path) -> UserError | None:
    """Return the error that names the format of a folder or file that is not read, None if it is not recognized."""
    for path in _samples(root):
        suffix = path.suffix.lower()
        if suffix in _SUFFIXES:
            return _error(root, path, *_SUFFIXES[suffix])
        head = head_of(path)
        for kind, pattern, name, hint in _CONTENTS:
            if suffix == kind and re.search(pattern, head, re.MULTILINE):
                return _error(root, path, name, hint)
    return None


def content_summary(root: Path) -> str:
    """Return what is in a folder: its folders, and the number of files per suffix."""
    if not root.is_dir():
        return root.name
    names = [name for name in sorted(os.listdir(root)) if not is_hidden(name)]
    folders = [f"{name}/" for name in names if (root / name).is_dir()]
    suffixes = Counter(os.path.splitext(name)[1].lower() or name for name in names if f"{name}/" not in folders)
    files = [f"{count} {suffix}" for suffix, count in suffixes.most_common(5)]
    shown = folders[:5] + (["…"] if len(folders) > 5 else []) + files
    return ", ".join(shown) or "nothing"


def _samples(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    seen: Counter[tuple[Path, str]] = Counter()
    for path in islice(walk_folder(root), MAX_FILES):
        key = (path.parent, path.suffix.lower())
        if is_hidden(path.relative_to(root)) or is_image(path.name) or seen[key] >= MAX_PER_SUFFIX:
            continue
        if path.is_file():
            seen[key] += 1
            yield path


def _error(root: Path, path: Path, name: str, hint: str) -> UserError:
    place = f"{path.relative_to(root)} looks" if path != root else "looks"
    return UserError(f"{root}: {place} like {name}; {hint}")
