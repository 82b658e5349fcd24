"""CSV tables with a row per object: of Roboflow, TensorFlow, keras-retinanet, AutoML, makesense.ai and Kaggle."""

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from ..utils.errors import UserError
from ..utils.images import read_size
from .annotation_files import Collector, FileSource, head_of, to_numbers
from .issues import Issue
from .matching import url_path
from .source import ParsedAnnotations, read_lines

# column → its names in lower case, without spaces, - and _
COLUMNS = {
    "name": ("filename", "file", "image", "imagename", "imagefile", "imagepath", "filepath", "path", "img", "imageid"),
    "class": ("class", "label", "category", "classname", "labelname", "name", "object"),
    "x0": ("xmin", "x0", "left", "bboxxmin", "x1"),
    "y0": ("ymin", "y0", "top", "bboxymin", "y1"),
    "x1": ("xmax", "x2", "right", "bboxxmax", "x1"),
    "y1": ("ymax", "y2", "bottom", "bboxymax", "y1"),
    "x": ("x", "bboxx", "boxx", "bboxleft", "left", "xmin"),
    "y": ("y", "bboxy", "boxy", "bboxtop", "top", "ymin"),
    "w": ("w", "bboxwidth", "bboxw", "boxwidth", "boxw", "width"),
    "h": ("h", "bboxheight", "bboxh", "boxheight", "boxh", "height"),
    "box": ("bbox", "box", "boundingbox"),
    "width": ("width", "imagewidth", "imgwidth"),
    "height": ("height", "imageheight", "imgheight"),
    "split": ("split", "set", "subset", "mluse"),
}
CORNERS, SIDES = ("x0", "y0", "x1", "y1"), ("x", "y", "w", "h")
# Tables without a header. An image without objects has a row of empty cells.
HEADERLESS = (
    ("name", *CORNERS, "class"),  # keras-retinanet
    ("class", *SIDES, "name", "width", "height"),  # makesense.ai
    ("split", "name", "class", "x0", "y0", "", "", "x1", "y1", "", ""),  # AutoML and Vertex AI: in 0..1
    ("name", "class", "x0", "y0", "", "", "x1", "y1", "", ""),
)
OPEN_IMAGES = {"labelname", "isgroupof"}  # its classes are codes
DEFAULT_CLASS = "object"  # of tables with boxes [x, y, width, height] and no classes


class CsvSource(FileSource):
    """One split in a CSV table; see `FileSource`. Boxes in 0..1 are multiplied by the size of their image."""

    format: ClassVar[str] = "csv"
    suffixes: ClassVar[tuple[str, ...]] = (".csv", ".tsv")

    @classmethod
    def accepts(cls, path: Path) -> bool:
        head = head_of(path).splitlines() if path.suffix.lower() in cls.suffixes else []
        return bool(head) and columns_of(next(_rows(head))) is not None

    @classmethod
    def subsets(cls, path: Path) -> set[str]:
        return {record["split"] for _, record in _records(path) if record.get("split")}

    def read_file(self, path: Path, split: Collector) -> None:
        ids: dict[str, int] = {}
        for number, record in _records(path):
            values = [record.get(key, "") for key in ("box", *CORNERS, *SIDES, "class")]
            if not self.in_split(record.get("split", ""), split, int(any(values))):
                continue
            name = url_path(record.get("name", "").replace("\\", "/"), 1)
            if not name:
                split.skip(path, f"line {number}", "names no image")
                continue
            if name not in ids:
                ids[name] = split.image(name, record.get("height"), record.get("width"))
            if any(values):  # otherwise an image without objects
                label = record.get("class", DEFAULT_CLASS if "box" in record else "")
                split.add(ids[name], label, _box(record), path, f"line {number}")

    def parse(self, masks: bool = False) -> ParsedAnnotations:
        """Read the tables, and turn boxes in 0..1 into pixels."""
        parsed = super().parse(masks)
        images, objects = parsed.content["images"], parsed.content["objects"]
        boxes = [item["bbox"] for item in objects]
        if not boxes or max(max(x + w, y + h) for x, y, w, h in boxes) > 1 or all(v % 1 == 0 for b in boxes for v in b):
            return parsed
        folder, issues = self.find_images([image["file_name"] for image in images]), list(parsed.issues)
        for image in images:
            path = folder.path / (folder.missing.get(image["file_name"]) or image["file_name"])
            own = [item for item in objects if item["image_id"] == image["id"]]
            try:
                height, width = read_size(path)
            except UserError as error:
                objects = [item for item in objects if item["image_id"] != image["id"]]
                issues.append(Issue.from_error("image-unreadable", path, error, objects=len(own)))
                continue
            for item in own:
                item["bbox"] = [side * value for side, value in zip((width, height) * 2, item["bbox"], strict=True)]
        return replace(parsed, content={"images": images, "objects": objects}, issues=issues)


def columns_of(header: list[str]) -> dict[str, int] | None:
    """Return the index of each used column of `COLUMNS`, None if the table is not one of objects."""
    if (layout := _layout(header)) is not None:
        return {key: index for index, key in enumerate(layout) if key}
    names = ["".join(ch for ch in text.lower() if ch not in " _-") for text in header]
    columns: dict[str, int] = {}
    for key, aliases in COLUMNS.items():
        if (index := next((names.index(alias) for alias in aliases if alias in names), None)) is not None:
            columns[key] = index
    for form in (CORNERS, SIDES, ("box",)):
        box = {columns[key] for key in form if key in columns}
        if len(box) == len(form):
            break
    else:
        return None
    if set(names) >= OPEN_IMAGES or not columns.keys() >= {"name", *(() if "box" in form else ("class",))}:
        return None
    used = {*form, "name", "class", "split"}
    return {key: n for key, n in columns.items() if key in used or (key in ("width", "height") and n not in box)}


def _layout(row: list[str]) -> tuple[str, ...] | None:
    """Return the layout of a row of a table without a header."""
    for layout in HEADERLESS:
        if len(row) == len(layout) and "." in row[layout.index("name")]:
            numbers = [cell for key, cell in zip(layout, row, strict=True) if key in CORNERS + SIDES]
            if to_numbers(numbers) or not any(numbers):
                return layout
    return None


def _records(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the line number and the cells of each row by the keys of `COLUMNS`."""
    lines = read_lines(path)
    header = next(_rows(lines), [])
    if (columns := columns_of(header)) is None:
        raise UserError(f"{path}: has no columns for the image, the class and xmin, ymin, xmax, ymax; rename them")
    first = 0 if _layout(header) else 1
    decimal_comma = _delimiter(lines) != ","
    for number, row in enumerate(_rows(lines), start=1):
        if number <= first or not any(row):
            continue
        record = {key: row[index].strip() if index < len(row) else "" for key, index in columns.items()}
        if decimal_comma:
            record |= {key: record[key].replace(",", ".") for key in CORNERS + SIDES if key in record}
        yield number, record


def _box(record: dict[str, str]) -> list[float] | None:
    """Return the xywh box of a row."""
    if "box" in record:
        values = to_numbers(record["box"].strip("[]() ").replace(",", " ").split())
        return values if values and len(values) == 4 else None
    if "x0" not in record:
        return to_numbers([record[key] for key in SIDES])
    corners = to_numbers([record[key] for key in CORNERS])
    return corners and [*corners[:2], corners[2] - corners[0], corners[3] - corners[1]]


def _rows(lines: list[str]) -> Iterator[list[str]]:
    return csv.reader(lines, delimiter=_delimiter(lines))


def _delimiter(lines: list[str]) -> str:
    return max(",;\t", key=lines[0].count) if lines else ","
