"""CVAT for images 1.1: XML files with the shapes of many images."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from .annotation_files import Collector, FileSource, extent, head_of, to_numbers, with_rotated
from .named import rotated_extent
from .voc import parse_xml

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_SUBSET = re.compile(rb"<image\s[^>]*?\bsubset=\"([^\"]+)\"")
IGNORED = {"tag"}  # classes of the whole image


class CvatSource(FileSource):
    """One split of a dataset in CVAT's own XML; see `FileSource`. Every shape counts with its extent."""

    format: ClassVar[str] = "cvat"
    suffix: ClassVar[str] = ".xml"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return path.suffix.lower() == ".xml" and re.search(r"<annotations[\s>]", head_of(path)) is not None

    @classmethod
    def subsets(cls, path: Path) -> set[str]:
        return {name.decode(errors="replace") for name in _SUBSET.findall(path.read_bytes())}

    def read_file(self, path: Path, split: Collector) -> None:
        root = parse_xml(path, split.issues, "annotations")
        if root is None:
            return
        frames = sum(shape.get("outside") != "1" for track in root.iter("track") for shape in track)
        if frames:
            message = f"has {frames} shapes of CVAT for video, which name no image files"
            split.skip(path, "", message, "export the task as CVAT for images 1.1 or COCO 1.0", objects=frames)
        rotated = 0
        for image in root.iter("image"):
            if self.subset and image.get("subset") != self.subset:
                continue
            name = image.get("name") or ""
            image_id = split.image(name.replace("\\", "/"), image.get("height"), image.get("width"))
            for index, shape in enumerate(shape for shape in image if shape.tag not in IGNORED):
                rotated += shape.tag == "box" and float(to_numbers([shape.get("rotation", 0)]) != [0])
                record = f"image {name!r} {shape.tag}[{index}]"
                split.add(image_id, shape.get("label"), shape_extent(shape), path, record)
        with_rotated(split, int(rotated), path)


def shape_extent(shape: "Element") -> list[float] | None:
    """Return the xywh box around a shape, None if its coordinates are not valid."""

    def numbers(*keys: str) -> list[float] | None:
        return to_numbers([shape.get(key, 0 if key == "rotation" else None) for key in keys])

    if shape.tag == "box":
        if values := numbers("xtl", "ytl", "xbr", "ybr", "rotation"):
            x0, y0, x1, y1, degrees = values
            return rotated_extent([x0, y0, x1 - x0, y1 - y0], degrees)
    elif shape.tag == "ellipse":
        if values := numbers("cx", "cy", "rx", "ry", "rotation"):
            cx, cy, rx, ry, degrees = values
            cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            half_width, half_height = math.hypot(rx * cos, ry * sin), math.hypot(rx * sin, ry * cos)
            return [cx - half_width, cy - half_height, 2 * half_width, 2 * half_height]
    elif shape.tag == "mask":
        return numbers("left", "top", "width", "height")
    elif shape.tag == "cuboid":
        corners = [f"{side}{number}" for number in (1, 2) for side in ("tl", "tr", "bl", "br")]
        return extent([[shape.get(axis + corner) for axis in "xy"] for corner in corners])
    else:  # polygon, polyline, points, skeleton
        texts = [part.get("points", "") for part in shape.iter() if part.get("outside") != "1" and part.get("points")]
        return extent([point.split(",") for text in texts for point in text.split(";") if point])
    return None
