"""What a check can find: every kind with its severity, what it means and the mend; and the list of what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

# What the rules below count with.
TINY_SIDE = 4.0  # pixels after the resize: half a cell of the finest feature map, stride 8
OVERHANG = 2.0  # pixels that a box may reach over its image's border, as rounding and labeling tools do
RARE = 10  # objects that a class needs in training
IMBALANCE = 50  # times as many objects as the rarest class has
SHOWN = 400  # characters of what a record says
CORNERS_PART = 0.2  # part of the boxes that must fit as corners only


@dataclass(frozen=True)
class Kind:
    """severity: an error stops the training. meaning, mend: for people, whole sentences without the full stop."""

    severity: Severity
    meaning: str
    mend: str


KINDS: dict[str, Kind] = {
    # --- files and splits
    "split-missing": Kind(
        "error", "The set has no such split", "Add it, divide the set with split, or name its files in the settings"
    ),
    "splits-same": Kind(
        "error", "Training and validation are the same file", "Divide it with split, or give each its own file"
    ),
    "file-unreadable": Kind(
        "error", "The annotation file is missing, no JSON, YAML or XML, or not of a known format", "Export it again"
    ),
    "set-refused": Kind("error", "The set cannot be opened, for the reason given", "As the line says"),
    "label-unreadable": Kind("error", "A label file of one image is missing or cannot be read", "Export it again"),
    "label-row": Kind("error", "A row of a label file is no object of the format", "Correct or remove the row"),
    # --- images
    "image-record": Kind("error", "An image's record lacks its id or file name", "Complete or remove the record"),
    "image-id-duplicate": Kind("error", "Two images have one id; their boxes are mixed up", "Give each its own"),
    "image-missing": Kind("error", "An image is listed but its file is missing", "Add the file or remove its record"),
    "image-name": Kind(
        "error",
        "A file name has \\ for /, %20 for a space, a path of elsewhere, other capitals or accents, or no ending; "
        "the file is there under its own",
        "Write the name of the file",
    ),
    "image-unreadable": Kind(
        "error", "A file is truncated, no image, empty, or above 89 megapixels", "Replace it or remove its record"
    ),
    "image-size": Kind(
        "warning",
        "A record's width and height are not the file's; boxes are taken in pixels of the file as it is",
        "Correct the record; where the image was resized after labeling, scale its boxes",
    ),
    "image-rotated": Kind(
        "warning",
        "A record has the size before the EXIF rotation; images are read upright, so its boxes may lie turned",
        "Turn the boxes, or store the image upright and label it again",
    ),
    "image-dim": Kind(
        "warning", "A gray image of 16 bits uses 12 of them or fewer, and is read almost black",
        "Scale its values to 0..65535, or save it with 8 bits",
    ),
    "image-in-parts": Kind(
        "error",
        "Two records of a split name one file, with different objects: those of one are background in the other",
        "Merge the records",
    ),
    "image-twice": Kind("warning", "Two records of a split name one file, with the same objects", "Merge the records"),
    "image-copy": Kind("note", "Two files of a split hold the same image", "Keep one"),
    "leak": Kind(
        "warning",
        "An image is in two splits (the same bytes or the same pixels): figures on the later one are too good",
        "Remove it from the training set",
    ),
    "image-empty": Kind("note", "An image has no objects; it is used as background", "None needed where that is true"),
    "images-unlisted": Kind("note", "Images lie in the folder that no record names", "Label them, or leave them"),
    # --- categories
    "category-record": Kind("error", "A category lacks its id or name, or there is none", "Complete the record"),
    "category-id-duplicate": Kind("error", "Two categories have one id", "Give each its own id"),
    "category-off-by-one": Kind(
        "error", "Categories count from 0 and their objects from 1, or the other way", "Count alike in both places"
    ),
    "category-unknown": Kind(
        "error", "An object's category is not among the categories", "List the category, or correct the object"
    ),
    "class-not-in-train": Kind(
        "error", "Objects have a class that the training set does not list", "List it there, or remove its objects"
    ),
    "category-name-duplicate": Kind("warning", "Two categories have one name", "Merge them, or rename one"),
    "category-renamed": Kind("warning", "An id has another name in another split; ids decide", "Use one list for all"),
    "category-renumbered": Kind(
        "warning", "The classes of the training set have other ids in another split; names decide",
        "Use one list for all",
    ),
    "class-only-in-val": Kind(
        "warning", "A class has objects to validate on, but none to train on", "Add training images with it"
    ),
    "class-rare": Kind("warning", f"A class has under {RARE} objects to train on", "Label more, or drop the class"),
    "class-imbalance": Kind(
        "warning",
        f"The most frequent class has over {IMBALANCE} times the objects of the rarest one",
        "Label more of the rare one",
    ),
    "class-not-in-val": Kind("note", "A trained class has no object to validate on: it gets no AP", "Add some"),
    "class-unused": Kind("note", "A category has no objects in any split", "Remove it, or leave it"),
    # --- objects
    "annotation-record": Kind(
        "error", "An object has no box of four finite numbers, or an iscrowd that is not 0 or 1", "Correct or remove it"
    ),
    "image-unknown": Kind("error", "An object's image is not among the images", "Add the image or remove the object"),
    "boxes-normalized": Kind(
        "error", "All boxes of a COCO file are in 0..1 instead of pixels", "Multiply them by the image's size"
    ),
    "boxes-corners": Kind(
        "error", "Boxes fit their images only if read as two corners instead of corner and size", "Write x, y, w, h"
    ),
    "no-training-objects": Kind(
        "error", "The training split has no usable objects at all", "Label its images"
    ),
    "annotation-id-duplicate": Kind("warning", "Objects have one id; they are numbered anew", "Number them"),
    "box-from-mask": Kind(
        "warning", "Objects have a mask but no box; the extent of the mask is taken",
        "None needed where the masks are whole",
    ),
    "box-degenerate": Kind("warning", "A box has no width or height; training skips it", "Correct or remove it"),
    "box-outside": Kind("warning", "A box lies outside its image; training skips it", "Correct or remove it"),
    "box-overhang": Kind(
        "warning", f"A box reaches more than {OVERHANG:g} pixels over the border; training cuts it", "Correct it"
    ),
    "box-duplicate": Kind("warning", "A box is there twice, class and all", "Keep one"),
    "tiny-objects": Kind(
        "warning",
        f"Objects whose shorter side is under {TINY_SIDE:g} pixels after the resize, half a cell of the finest map",
        "Use a larger --image-size, or cut the images into tiles",
    ),
    "no-objects": Kind(
        "warning", "A split that is not trained on has no usable objects at all", "Label its images"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Issue:
    """One thing found.

    code: a key of `KINDS`. file, record: where. what, mend: the words of the line. split: 'train', 'val', …
    section, position: the record in the COCO dict ('images', 'annotations', 'categories'), where it is one.
    image: the picture that shows it; box: xywh in its pixels; other: the second picture of a pair.
    """

    code: str
    file: Path
    record: str
    what: str
    mend: str
    split: str = ""
    section: str = ""
    position: int = -1
    image: Path | None = None
    box: tuple[float, float, float, float] | None = None
    other: Path | None = None

    @property
    def severity(self) -> Severity:
        return KINDS[self.code].severity

    @property
    def line(self) -> str:
        """Where, what and the mend on one line."""
        record, what = (text if len(text) <= SHOWN else f"{text[:SHOWN]}…" for text in (self.record, self.what))
        text = f"{self.file}: {record}{' ' if record else ''}{what}; {self.mend}"
        # A file's name may hold bytes that are no text, which a terminal refuses.
        return " ".join(text.split()).encode(errors="backslashreplace").decode()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        facts: dict[str, Any] = {"severity": self.severity, "code": self.code, "split": self.split}
        facts |= {"file": str(self.file), "record": self.record, "what": self.what, "mend": self.mend}
        if self.position >= 0:
            facts |= {"section": self.section, "position": self.position}
        facts |= {key: str(path) for key, path in (("image", self.image), ("other", self.other)) if path is not None}
        return facts | ({"box": list(self.box)} if self.box is not None else {})


@dataclass
class Findings:
    """What was found so far, in the order of finding."""

    found: list[Issue] = field(default_factory=list)

    def add(self, code: str, file: Path, record: str, what: str, mend: str = "", **more: Any) -> None:
        """A finding; without `mend`, the one of its kind."""
        mend = mend or KINDS[code].mend[0].lower() + KINDS[code].mend[1:]
        self.found.append(Issue(code, file, record, what, mend, **more))

    def __iter__(self) -> Iterator[Issue]:
        return iter(self.found)

    def of(self, severity: Severity) -> list[Issue]:
        return [finding for finding in self.found if finding.severity == severity]

    def by_code(self) -> dict[str, list[Issue]]:
        """Findings by kind, errors first, the kinds in the order of `KINDS`."""
        counts = Counter(finding.code for finding in self.found)
        order = sorted(counts, key=lambda code: (SEVERITIES.index(KINDS[code].severity), list(KINDS).index(code)))
        return {code: [finding for finding in self.found if finding.code == code] for code in order}
