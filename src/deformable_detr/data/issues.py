"""Issues of a dataset: training raises the first error, `check` collects all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..utils.errors import UserError

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

TINY_SIDE = 4.0  # pixels after the resize: half a cell of the finest feature map, which has stride 8
SMALL_SIDE = 16.0  # pixels after the resize: two cells of the finest feature map
OVERHANG = 2.0  # pixels that a box may exceed its image by, because tools round
RARE = 10  # training objects that a class needs
IMBALANCE = 50  # largest ratio of the objects of two classes
MAX_TEXT = 400  # characters of the record and of the message in a line
MASK_BOX_IOU = 0.5  # lowest IoU of the extent of a mask and its box
CROSSING = 0.1  # largest part of the area of a mask that an outline may cover twice
CORNERS_SHARE = 0.2  # share of the boxes that must fit only as corners


@dataclass(frozen=True)
class IssueType:
    """Severity, meaning and hint of a type of issue; errors stop the training."""

    severity: Severity
    meaning: str
    hint: str


_ERRORS = {
    # files and splits
    "split-missing": ("The dataset lacks this split", "Add it, create it with split, or set its files in the config"),
    "splits-same": ("Training and validation use the same file", "Create a validation split, or use separate files"),
    "file-unreadable": ("The annotation file is missing, or not of a known format", "Export it again"),
    "dataset-rejected": ("The dataset cannot be opened for the given reason", "See the message"),
    "label-unreadable": ("The label file of an image is missing or unreadable", "Export it again"),
    "label-row": ("A row of a label file is not a valid object", "Correct or remove the row"),
    # images
    "image-missing": ("The file of a listed image is missing", "Add the file or remove the record"),
    "label-unmatched": (
        "A label file with objects belongs to no image", "Rename it like its image, or remove it",
    ),
    "image-record": ("An image record lacks its id or file name", "Complete or remove the record"),
    "image-id-duplicate": ("Two images share an id, so their boxes are mixed up", "Give each image its own id"),
    "image-unreadable": (
        "A file is truncated, empty, not an image, or exceeds 89 megapixels", "Replace it or remove its record",
    ),
    "image-in-parts": (
        "Two records of a split name one file, and each lacks objects of the other", "Merge the records",
    ),
    # categories
    "category-record": ("A category lacks its id or name, or there are no categories", "Complete the record"),
    "category-id-duplicate": ("Two categories share an id", "Give each category its own id"),
    "category-off-by-one": (
        "Categories count from 0 and objects from 1, or vice versa", "Start both at the same number",
    ),
    "category-unknown": ("The category of an object is not listed", "List the category or correct the object"),
    "class-not-in-train": ("Objects have a class that the training split lacks", "List it there or remove the objects"),
    # objects
    "annotation-record": (
        "An object has no box of four finite numbers, or an iscrowd other than 0 and 1", "Correct or remove it",
    ),
    "image-unknown": ("The image of an object is not listed", "Add the image or remove the object"),
    "boxes-normalized": ("All boxes of a COCO file are in 0..1 instead of pixels", "Multiply them by the image size"),
    "boxes-corners": ("Boxes fit their images only as x0, y0, x1, y1", "Write them as x, y, width, height"),
    "no-training-objects": ("The training split has no usable objects", "Label its images"),
}  # fmt: skip
_WARNINGS = {
    "image-name": (
        "A file name differs in case, accents, suffix, folder or separators; the only similar file is used",
        "Rename the file or its record, for example with deformable-detr check --fix",
    ),
    "label-name": (
        "A label file has objects, but no image of its name; they are read for the only image with a similar name",
        "Rename it, for example with deformable-detr check --fix",
    ),
    "label-confidence": ("Rows of a label file have values after the box, which are ignored", "Remove these columns"),
    "label-keypoints": ("Rows fit a box with keypoints, but there is no kpt_shape", "Set kpt_shape in data.yaml"),
    "classes-differ": (
        "A list of classes beside the labels contradicts data.yaml, whose names are used", "Use one list of classes",
    ),
    "path-moved": ("A path of another machine is read by its end", "Correct the path"),
    "image-format": ("Images have a format that is not read, such as HEIC", "Convert them to JPEG or PNG"),
    "annotations-unread": (
        "Another COCO file beside the one that is read has objects of more images", "Merge the files",
    ),
    "outside-splits": ("A folder has labeled images that are in no split", "Move them to a split's folder"),
    "image-size": (
        "The size in a record differs from the file; boxes are read as pixels of the file",
        "Correct the record, or scale the boxes if the image was resized after labeling",
    ),
    "image-rotated": (
        "A record has the size before the EXIF rotation; images are read upright, so its boxes may be rotated",
        "Rotate the boxes, or store the image upright and label it again",
    ),
    "pixel-origin-unclear": (
        "The XML files conflict on whether pixels count from 0 or from 1", "Set data.voc_origin to 0 or 1",
    ),
    "image-dim": (
        "A 16-bit image uses at most 12 bits and is almost black",
        "Scale its values to 0..65535, or save it with 8 bits",
    ),
    "image-twice": ("Two records of a split name one file, with the same objects", "Merge the records"),
    "leak": (
        "An image is in two splits (same bytes or pixels), which inflates the metrics of the later one",
        "Remove it from the training split",
    ),
    "category-name-duplicate": ("Two categories share a name", "Merge or rename them"),
    "category-renamed": ("An id has different names in two splits; ids decide", "Use one list for all splits"),
    "category-renumbered": ("Training classes have other ids here; names decide", "Use one list for all splits"),
    "class-only-in-val": ("A class has validation objects, but no training objects", "Add training images with it"),
    "class-rare": (f"A class has fewer than {RARE} training objects", "Label more objects, or drop the class"),
    "class-imbalance": (
        f"The most frequent class has over {IMBALANCE} times the objects of the rarest", "Label more of the rare class",
    ),
    "annotation-id-duplicate": ("Objects share an id and are renumbered", "Number them uniquely"),
    "box-from-mask": (
        "Objects have a mask but no box; the extent of the mask is used", "None needed if the masks are complete",
    ),
    "box-rotated": ("Boxes are rotated; the upright box around each is used", "Draw upright boxes if too large"),
    "box-swapped": (
        "The corners of a box are in another order, or its width or height is negative; the box between them is used",
        "Check some of these boxes",
    ),
    "box-degenerate": ("A box has no width or height; training skips it", "Correct or remove it"),
    "box-outside": ("A box lies outside its image; training skips it", "Correct or remove it"),
    "box-overhang": (f"A box exceeds its image by over {OVERHANG:g} pixels; training clips it", "Correct it"),
    "box-duplicate": ("A box appears twice with the same class", "Keep one"),
    "mask-broken": (
        "A mask, or a part of it, is not a polygon of three points or valid run lengths; training skips it",
        "Correct or remove it",
    ),
    "mask-empty": ("A mask has no area, such as a line; training skips it", "Remove it"),
    "mask-outside": (f"A mask exceeds its image by over {OVERHANG:g} pixels; training clips it", "Correct it"),
    "mask-crossing": (
        f"An outline crosses itself, with over {CROSSING:.0%} of its area; loops may count as holes",
        "Draw it again, or split it into parts",
    ),
    "mask-box": (
        f"The IoU of the extent of a mask and its box is under {MASK_BOX_IOU:g}; training clips the mask to the box",
        "Correct the one that is wrong",
    ),
    "mask-size": ("Run lengths have another size than their image", "Encode the mask at the size of the image"),
    "too-many-objects": (
        "Images have more objects than the model has queries", "Train with more queries: --set model.num_queries=N",
    ),
    "tiny-objects": (
        f"Objects have a side under {TINY_SIDE:g} pixels after the resize, half a cell of the finest feature map",
        "Use a larger --image-size, or tiles: --tile N",
    ),
    "small-objects": (
        f"The median training object has under {SMALL_SIDE:g} pixels after the resize",
        "Train and predict with --tile N",
    ),
    "no-objects": ("A split other than the training split has no usable objects", "Label its images"),
}  # fmt: skip
_NOTES = {
    "crowded-images": ("Images have more objects than metrics count and model.predict lists by default", "Set top_k"),
    "masks-missing": (
        "Some objects have a box but no mask; they train only the box",
        "Draw their masks, or leave them",
    ),
    "image-copy": ("Two files of a split hold the same image", "Keep one"),
    "image-empty": ("An image has no objects and is used as background", "None needed if this is correct"),
    "pixel-origin": ("Whether the pixels of Pascal VOC files count from 0 or 1", "None needed if this is correct"),
    "images-unlisted": ("The folder has images without a record", "Label them, or leave them"),
    "class-not-in-val": ("A training class has no validation objects, so it gets no AP", "Add validation images"),
    "class-unused": ("A category has no objects in any split", "Remove it, or leave it"),
}
ISSUE_TYPES = {
    code: IssueType(severity, meaning, hint)
    for severity, types in zip(SEVERITIES, (_ERRORS, _WARNINGS, _NOTES), strict=True)
    for code, (meaning, hint) in types.items()
}


@dataclass
class Issue:
    """One record that cannot be used, or that is used with a doubt.

    Attributes:
        code: The type, a key of `ISSUE_TYPES`.
        file: The annotation, label or image file.
        record: Place in the file, such as 'annotations[3] (id 7)'; empty for the whole file.
        message: What is wrong.
        hint: What to do. Default: the hint of the type.
        section: List of the COCO dict: 'images', 'annotations' or 'categories'.
        position: Index in that list; -1 if the issue is about no single record.
        image: Image file that shows the issue.
        box: xywh in pixels of that image.
        split: Name of the split, if known.
        other: The second image of a pair.
        objects: Objects in the files that are left out because of it and that the split does not count.
    """

    code: str
    file: Path
    record: str
    message: str
    hint: str = ""
    section: str = ""
    position: int = -1
    image: Path | None = None
    box: tuple[float, ...] | None = None
    split: str = ""
    other: Path | None = None
    objects: int = 0

    def __post_init__(self) -> None:
        default = ISSUE_TYPES[self.code].hint
        self.hint = self.hint or default[0].lower() + default[1:]

    @classmethod
    def from_error(cls, code: str, file: Path, error: UserError, **details: Any) -> Issue:
        """Turn an error about a file into an issue: its last clause is the hint."""
        message, _, hint = str(error).removeprefix(f"{file}: ").rpartition("; ")
        return cls(code, file, "", message or hint, hint if message else "", **details)

    @property
    def severity(self) -> Severity:
        return ISSUE_TYPES[self.code].severity

    @property
    def line(self) -> str:
        """File, record, message and hint on one line."""
        texts = (self.record, self.message)
        record, message = (text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…" for text in texts)
        line = f"{self.file}: {record} {message}; {self.hint}"
        # File names may contain bytes that are not text, which a terminal rejects.
        return " ".join(line.split()).encode(errors="backslashreplace").decode()

    def to_dict(self) -> dict[str, Any]:
        """Return the issue as a dict for JSON."""
        values: dict[str, Any] = {"severity": self.severity, "code": self.code, "split": self.split}
        values |= {"file": str(self.file), "record": self.record, "message": self.message, "hint": self.hint}
        if self.position >= 0:
            values |= {"section": self.section, "position": self.position}
        values |= {key: str(path) for key, path in (("image", self.image), ("other", self.other)) if path is not None}
        values |= {"objects": self.objects} if self.objects else {}
        return values | ({"box": list(self.box)} if self.box is not None else {})


OnIssue = Callable[[Issue], object]


def raise_error(issue: Issue) -> None:
    """Raise an error as a `UserError`; ignore warnings and notes."""
    if issue.severity == "error":
        raise UserError(issue.line)


class Issues(list[Issue]):
    """Issues in the order in which they were found."""

    def add(self, code: str, file: Path, record: str, message: str, hint: str = "", **details: Any) -> None:
        """Append an issue; `details` are the other fields of `Issue`."""
        self.append(Issue(code, file, record, message, hint, **details))

    def of(self, severity: Severity) -> list[Issue]:
        """Return the issues of one severity."""
        return [issue for issue in self if issue.severity == severity]

    def by_code(self) -> dict[str, list[Issue]]:
        """Group the issues by type, in the order of `ISSUE_TYPES`: errors first."""
        counts = Counter(issue.code for issue in self)
        return {code: [issue for issue in self if issue.code == code] for code in ISSUE_TYPES if counts[code]}
