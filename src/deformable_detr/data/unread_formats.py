"""Formats that are not read: recognize them by a few bytes, and say how to convert them."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ..utils.errors import UserError
from .annotation_files import head_of
from .discovery import SPLIT_ALIASES, is_hidden, is_image, walk_folder

MAX_FILES = 2000  # files that are looked at
NO_CLASSES = {"", "images", "data", "jpegimages", *(name for names in SPLIT_ALIASES for name in names)}  # of folders
MAX_PER_SUFFIX = 3  # files per folder and suffix of which the first bytes are read
DATUMARO = "convert it to COCO, for example with datum convert -if {} -f coco"

_FLOAT = r"-?\d+(?:\.\d+)?(?:[eE]-?\d+)?"
_TO_FILES = "save its images as files and its boxes as metadata.jsonl or COCO"
_EXPORT = "export it as COCO"
_VIA = "export it as COCO (Annotation > Export Annotations)"
# End of the name, text in the first bytes, format, way out. The first entry that matches a file counts.
_FORMATS = [
    (r"\.parquet", "", "a Hugging Face dataset in Parquet", _TO_FILES),
    (r"\.arrow", "", "a Hugging Face dataset in Arrow", _TO_FILES),
    (r"\.(tf)?records?(-\d+-of-\d+)?", "", "TFRecord", DATUMARO.format("tf_detection_api")),
    (r"\.vott", "", "a VoTT project", "export it as Pascal VOC"),
    (r"\.odgt", "", "CrowdHuman", "convert it to COCO"),
    (r"\.labels", "boundingBoxes", "Edge Impulse", "export it as COCO, or convert it"),
    (r"\.(manifest|jsonl?)", "source-ref", "a SageMaker Ground Truth manifest", "convert it to COCO"),
    (r"\.json", r'_via_|"shape_attributes"|VGG Image Annotator', "a VIA project", _VIA),
    (r"\.csv", r"region_shape_attributes|VGG Image Annotator", "a VIA table", _VIA),
    (r"\.[ct]sv", "rectanglelabels|polygonlabels", "a Label Studio table", "export it as COCO or YOLO"),
    (
        r"\.json", r'"(rectangle|polygon|brush)labels"|"completed_by"|"from_name"', "Label Studio's own JSON",
        "export it as COCO or YOLO",
    ),
    (r"\.json", r'"classTitle"|"geometryType"|"projectType"|"labelerLogin"', "Supervisely", _EXPORT),
    ("meta.json", r'"title"', "Supervisely", _EXPORT),
    (r"\.json", r'"dm_format_version"|"label":\s*{\s*"labels"', "Datumaro's JSON", DATUMARO.format("datumaro")),
    (
        r"\.json", r'"asset"\s*:\s*{[^}]*"format"|"lastVisitedAssetId"|"videoSettings"', "a VoTT project",
        "export it as Pascal VOC",
    ),
    (r"\.(nd)?json", r'"data_row"|"DataRow ID"|"Labeled Data"', "Labelbox", "convert it to COCO"),
    (r"\.json", r"darwin_json|darwin-public", "Darwin JSON of V7", _EXPORT),
    (r"\.json", r'"label_hash"|"data_hash"', "Encord", _EXPORT),
    (r"\.json", r'"datasetId"', "Dataloop", _EXPORT),
    (r"\.json", r'"task_id"[^\0]*"(attachment|response)"', "Scale AI", "convert it to COCO"),
    (r"\.json", r'"box2d"', "BDD100K", "convert it to COCO"),
    (r"\.json", r'"imgHeight"', "Cityscapes", "convert it to COCO"),
    (
        r"\.json", r'"_cls"|"sample_fields"|"bounding_box"\s*:', "FiftyOne's own JSON",
        "export it as fiftyone.types.COCODetectionDataset",
    ),
    (r"^panoptic_.*\.json", "", "COCO panoptic", "give the instances file"),
    (r"^(captions|image_info|stuff)_.*\.json", "", "a COCO file without boxes", "give the instances file"),
    (r"\.json", r'"bbox"[^]]*\][^]]*"score"|"score"[^]]*"bbox"', "COCO results", "give the annotations instead"),
    (r"\.txt", rf"\A\S+ {_FLOAT} -?\d+(?: {_FLOAT}){{12,13}}\s*$", "KITTI", DATUMARO.format("kitti")),
    (r"\.txt", rf"^(?:{_FLOAT} ){{8}}\S*[^\d\s.]\S*(?: [012])?\s*$", "DOTA", "convert it to COCO or YOLO"),
    (
        r"\.txt", rf"\A[^\W\d][^\n]*?(?: {_FLOAT}){{4}}\s*$", "class names and pixels of the OIDv4 toolkit",
        "write YOLO rows (number of the class, then cx cy w h in 0..1) and a data.yaml, or COCO",
    ),
    (r"\.csv", r"(?i)imageid.*labelname.*xmin", "an Open Images table", DATUMARO.format("open_images")),
    (r"\.txt", rf"\A[^\n]+\.(?:jpe?g|png)\s*\n\d+\s*\n{_FLOAT} ", "WIDER FACE", DATUMARO.format("wider_face")),
    (r"gt\.txt", rf"\A\d+,-?\d+(?:,{_FLOAT}){{4,}}", "MOT", DATUMARO.format("mot_seq")),
    (r"\.txt", r"\A-?\d+(?:,-?\d+){7},?\s*$", "VisDrone", "convert it to COCO"),
    (
        r"\.txt", rf"\A\d+(?: {_FLOAT}){{4,}}\s*$", "YOLO rows without class names",
        "add a data.yaml or classes.txt with the names",
    ),
    (
        r"\.xml", r"<annotation[\s>]", "Pascal VOC in another layout",
        "put the XML files beside their images, in a folder per split",
    ),
    (
        r"\.(zip|tar|tgz|gz|bz2|xz|7z|rar)", "", "an archive, which is not read (WebDataset included)",
        "unpack it and give its folder",
    ),
    (
        r"\.[ct]sv", r"\A[^\n]*[,;\t]", "a table without columns for the image and xmin, ymin, xmax, ymax",
        "name its columns so, or write COCO",
    ),
]  # fmt: skip
_MASKS = re.compile(
    r"masks?|segmentationclass|segmentationobject|gtfine|(semantic|instance)?_?labels_?(rgb)?", re.IGNORECASE
)
_DOCUMENT = re.compile(r"readme.*|license.*|.*\.(md|html|pdf)", re.IGNORECASE)


def unread_format(root: Path) -> UserError | None:
    """Return the error that names the format of a folder or file that is not read, None if it is not recognized."""
    samples = [(path, head_of(path)) for path in _samples(root)]
    for suffix, pattern, name, hint in _FORMATS:
        for path, head in samples:
            if re.search(f"{suffix}$", path.name.lower()) and re.search(pattern, head, re.MULTILINE):
                return _error(root, path, name, hint)
    if root.is_file():
        return UserError(f"{root}: is an image; give the folder of a dataset") if is_image(root.name) else None
    return _only_images(root, any(not _DOCUMENT.fullmatch(path.name) for path, _ in samples))


def _only_images(root: Path, other_files: bool) -> UserError | None:
    """Return the error of a folder that has masks, or images and no other files."""
    files = (path.relative_to(root) for path in islice(walk_folder(root), MAX_FILES))
    images = [path for path in files if is_image(path)]
    folders = {path.parent.name for path in images}
    if not images:
        return None
    if masks := next((part for path in images for part in path.parts[:-1] if _MASKS.fullmatch(part)), None):
        return UserError(f"{root}: has images in '{masks}', but no boxes; convert these masks to COCO")
    if other_files:
        return None
    classes = sorted(name for name in folders if name.lower() not in NO_CLASSES)
    if len(classes) > 1:
        names = ", ".join(classes[:3])
        message = f"has no boxes; its folders ({names}) look like the classes of a classification dataset"
        return UserError(f"{root}: {message}; draw boxes with a labeling tool")
    return UserError(f"{root}: has only images and no annotations; label them, or put the annotation files beside")


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
