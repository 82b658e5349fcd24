"""Hugging Face ImageFolder: a `metadata.jsonl` with a line of JSON per image."""

import json
import re
from pathlib import Path
from typing import Any, ClassVar

from .annotation_files import Collector, FileSource, to_numbers
from .source import read_lines

METADATA = "metadata.jsonl"
CLASS_KEYS = ("categories", "category", "category_id", "labels", "label", "classes", "class", "name")
_FOLDER = re.compile(r'"file_name"\s*:\s*"([^"/\\]+)/')


class ImageFolderSource(FileSource):
    """One split of a Hugging Face ImageFolder; see `FileSource`. Boxes are [x, y, width, height] in pixels."""

    format: ClassVar[str] = "imagefolder"
    suffix: ClassVar[str] = ".jsonl"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return path.name == METADATA

    @classmethod
    def subsets(cls, path: Path) -> set[str]:
        return {match[1] for line in read_lines(path) for match in [_FOLDER.search(line)] if match}

    def read_file(self, path: Path, split: Collector) -> None:
        for number, line in enumerate(read_lines(path), start=1):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                record = json.loads(line)
                name = record["file_name"]
                boxes, labels = _objects(record.get("objects"))
            except (ValueError, TypeError, KeyError, AttributeError):
                split.skip(path, place, "is not JSON with a 'file_name' and 'objects'")
                continue
            if self.subset and not name.startswith(f"{self.subset}/"):
                continue
            image_id = split.image(name, record.get("height"), record.get("width"))
            if len(boxes) != len(labels):
                message = f"has {len(boxes)} boxes but {len(labels)} categories"
                split.skip(path, place, message, objects=max(len(boxes), len(labels)))
                continue
            for index, (box, label) in enumerate(zip(boxes, labels, strict=True)):
                values = to_numbers(box)
                split.add(image_id, label, values if values and len(values) == 4 else None, path, f"{place} [{index}]")


def _objects(objects: Any) -> tuple[list[Any], list[Any]]:
    """Return the boxes and the classes: of a dict of lists, or of a list of dicts."""
    if not objects:
        return [], []
    if isinstance(objects, list):
        return [item.get("bbox") for item in objects], [_first(item) for item in objects]
    return list(objects["bbox"]), list(_first(objects) or [])


def _first(record: dict[str, Any]) -> Any:
    return next((record[key] for key in CLASS_KEYS if record.get(key) is not None), None)
