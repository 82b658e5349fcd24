"""CSV tables with a row per object, as Roboflow (Tensorflow), TensorFlow tutorials and keras-retinanet write them."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from ..utils.errors import UserError
from .annotation_files import Collector, FileSource, head_of, to_number, to_numbers
from .source import read_lines

# column → its names in lower case, without spaces, - and _
COLUMNS = {
    "name": ("filename", "file", "image", "imagename", "imagefile", "imagepath", "filepath", "path", "img", "imageid"),
    "class": ("class", "label", "category", "classname", "labelname", "name", "object"),
    "x0": ("xmin", "x0", "left", "bboxxmin", "x1"),
    "y0": ("ymin", "y0", "top", "bboxymin", "y1"),
    "x1": ("xmax", "x2", "right", "bboxxmax"),
    "y1": ("ymax", "y2", "bottom", "bboxymax"),
    "width": ("width", "imagewidth", "imgwidth"),
    "height": ("height", "imageheight", "imgheight"),
}
RETINANET = ("name", "x0", "y0", "x1", "y1", "class")  # keras-retinanet: no header; images without objects have ,,,,,
REQUIRED = set(RETINANET)
OPEN_IMAGES = {"labelname", "isgroupof", "confidence"}  # in 0..1, and its classes are codes


class CsvSource(FileSource):
    """One split in a CSV table; see `FileSource`. Coordinates are used as they are."""

    format: ClassVar[str] = "csv"
    suffix: ClassVar[str] = ".csv"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        head = head_of(path).splitlines() if path.suffix.lower() == ".csv" else []
        return bool(head) and columns_of(next(_rows(head))) is not None

    def read_file(self, path: Path, split: Collector) -> None:
        lines = read_lines(path)
        rows = _rows(lines)
        header = next(rows, [])
        columns = columns_of(header)
        if columns is None:
            raise UserError(f"{path}: has no columns for the image, the class and xmin, ymin, xmax, ymax; rename them")
        without_header = header and columns == dict(zip(RETINANET, range(6), strict=True)) and _is_retinanet(header)
        ids: dict[str, int] = {}
        for number, row in enumerate([header, *rows] if without_header else rows, start=1 if without_header else 2):
            if not any(row):
                continue
            record = {key: row[index].strip() for key, index in columns.items() if index < len(row)}
            name = record.get("name", "").replace("\\", "/")
            if not name:
                split.skip(path, f"line {number}", "names no image")
                continue
            if name not in ids:
                ids[name] = split.image(name, record.get("height"), record.get("width"))
            if not any(record.get(key) for key in RETINANET[1:]):
                continue  # an image without objects
            values = [record.get(key) or "" for key in RETINANET[1:5]]
            if _delimiter(lines) != ",":  # such tables may have decimal commas
                values = [value.replace(",", ".") for value in values]
            corners = to_numbers(values)
            box = corners and [*corners[:2], corners[2] - corners[0], corners[3] - corners[1]]
            split.add(ids[name], record.get("class"), box, path, f"line {number}")


def columns_of(header: list[str]) -> dict[str, int] | None:
    """Return the index of each column of `COLUMNS`, None if the table is not one of objects."""
    names = ["".join(ch for ch in text.lower() if ch not in " _-") for text in header]
    if _is_retinanet(header):
        return dict(zip(RETINANET, range(6), strict=True))
    columns: dict[str, int] = {}
    for key, aliases in COLUMNS.items():
        found = next((names.index(alias) for alias in aliases if alias in names), None)
        if found is None and key in ("x1", "y1") and f"{key[0]}0" in names and key in names:
            found = names.index(key)  # the tables with x1 and x2 have no x0
        if found is not None and found not in columns.values():
            columns[key] = found
    return columns if columns.keys() >= REQUIRED and not set(names) >= OPEN_IMAGES else None


def _is_retinanet(row: list[str]) -> bool:
    numbers = [to_number(value) for value in row[1:5]]
    return len(row) == 6 and "." in row[0] and (None not in numbers or not any(row[1:]))


def _rows(lines: list[str]) -> Iterator[list[str]]:
    return csv.reader(lines, delimiter=_delimiter(lines))


def _delimiter(lines: list[str]) -> str:
    return max(",;\t", key=lines[0].count) if lines else ","
