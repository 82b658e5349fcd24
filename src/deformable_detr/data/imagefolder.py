"""Hugging Face ImageFolder: a `metadata.jsonl`, `.csv` or `.parquet` with a record per image."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from ..utils.files import open_regular
from ..utils.packages import need
from .annotation_files import Collector, FileSource, head_of, to_numbers
from .source import read_lines

BOX_KEYS = ("bbox", "bboxes", "boxes")
CLASS_KEYS = ("categories", "category", "category_id", "labels", "label", "classes", "class", "name")
_FOLDER = re.compile(r"([^/\\]+)[/\\]")


class ImageFolderSource(FileSource):
    """One split of a Hugging Face ImageFolder; see `FileSource`. Boxes are [x, y, width, height] in pixels."""

    format: ClassVar[str] = "imagefolder"
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".csv", ".parquet")

    @classmethod
    def accepts(cls, path: Path) -> bool:
        if path.stem != "metadata" or path.suffix not in cls.suffixes:
            return False
        return path.suffix != ".csv" or re.match(r"[^\n]*\b(objects|bbox(es)?|boxes)\b", head_of(path)) is not None

    @classmethod
    def subsets(cls, path: Path) -> set[str]:
        names = [record.get("file_name") for _, record in _records(path) if isinstance(record, dict)]
        return {match[1] for name in names if isinstance(name, str) and (match := _FOLDER.match(name))}

    def read_file(self, path: Path, split: Collector) -> None:
        for number, record in _records(path):
            place = f"line {number}"
            try:
                name = record["file_name"]
                objects = record.get("objects", record)
                boxes, labels = _objects(json.loads(objects) if isinstance(objects, str) else objects)
            except (ValueError, TypeError, KeyError, AttributeError):
                split.skip(path, place, "is not a record with 'file_name' and 'objects'")
                continue
            folder = _FOLDER.match(name)
            if not self.in_split(folder[1] if folder else "", split, len(boxes)):
                continue
            image_id = split.image(name.replace("\\", "/"), record.get("height"), record.get("width"))
            if len(boxes) != len(labels):
                message = f"has {len(boxes)} boxes but {len(labels)} categories"
                split.skip(path, place, message, objects=max(len(boxes), len(labels)))
                continue
            for index, (box, label) in enumerate(zip(boxes, labels, strict=True)):
                values = to_numbers(box)
                split.add(image_id, label, values if values and len(values) == 4 else None, path, f"{place} [{index}]")


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the content of each line; None if it is not JSON."""
    if path.suffix == ".parquet":
        with open_regular(path) as file:
            yield from enumerate(need("pyarrow.parquet", "dataset").read_table(file).to_pylist(), start=1)
    elif path.suffix == ".csv":
        yield from enumerate(csv.DictReader(read_lines(path)), start=2)
    else:
        for number, line in enumerate(read_lines(path), start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError:
                    yield number, None


def _objects(objects: Any) -> tuple[list[Any], list[Any]]:
    """Return the boxes and the classes: of a dict of lists, or of a list of dicts."""
    if not objects:
        return [], []
    if isinstance(objects, list):
        return [_first(item, BOX_KEYS) for item in objects], [_first(item, CLASS_KEYS) for item in objects]
    boxes, labels = ([*(_first(objects, keys) or [])] for keys in (BOX_KEYS, CLASS_KEYS))
    return boxes, labels


def _first(record: dict[str, Any], keys: tuple[str, ...]) -> Any:
    value = next((record[key] for key in keys if record.get(key) is not None), None)
    return json.loads(value) if isinstance(value, str) and value.startswith("[") else value
