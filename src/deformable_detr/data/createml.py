"""Create ML: a JSON file with a list of images; boxes are given by their center."""

import re
from pathlib import Path
from typing import Any, ClassVar

from ..utils.errors import UserError
from .annotation_files import Collector, FileSource, head_of, read_json, to_numbers

NAME_KEYS = ("image", "imagefilename", "imageURL")
_IMAGE = re.compile(r'"image(filename|URL)?"\s*:\s*"')
_ANNOTATIONS = re.compile(r'"annotations?"\s*:\s*\[')
_LABEL_STUDIO = re.compile(r'"(data|rectanglelabels|completions|file_upload)"\s*:')


class CreateMlSource(FileSource):
    """One split of a Create ML dataset; see `FileSource`."""

    format: ClassVar[str] = "createml"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        head = head_of(path) if path.suffix.lower() == ".json" else ""
        matches = head.lstrip().startswith("[") and _IMAGE.search(head) and _ANNOTATIONS.search(head)
        return bool(matches) and not _LABEL_STUDIO.search(head)

    def read_file(self, path: Path, split: Collector) -> None:
        content = read_json(path)
        if not isinstance(content, list):
            raise UserError(f"{path}: is not a list of images as Create ML writes it; export it again")
        for position, record in enumerate(content):
            record = record if isinstance(record, dict) else {}
            name = next((record[key] for key in NAME_KEYS if record.get(key)), None)
            objects = record.get("annotations", record.get("annotation"))
            objects = objects if isinstance(objects, list) else []
            if not isinstance(name, str):
                split.skip(path, f"[{position}]", "names no image", objects=len(objects))
                continue
            image_id = split.image(name.replace("\\", "/"))
            for index, item in enumerate(objects):
                item = item if isinstance(item, dict) else {}
                place = f"[{position}] annotations[{index}]"
                split.add(image_id, item.get("label"), _box(item.get("coordinates")), path, place)


def _box(coordinates: Any) -> list[float] | None:
    keys = ("x", "y", "width", "height")
    values = to_numbers([coordinates.get(key) for key in keys]) if isinstance(coordinates, dict) else None
    if values is None:
        return None
    cx, cy, width, height = values
    return [cx - width / 2, cy - height / 2, width, height]
