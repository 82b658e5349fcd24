"""CVAT for images 1.1: XML files with the shapes of many images; CVAT for video 1.1 with its frames."""

import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..utils.files import read_regular
from .annotation_files import Collector, FileSource, decode, extent, head_of, to_number, to_numbers, with_rotated
from .discovery import is_image, walk_folder
from .named import rotated_extent
from .segmentation import Segmentation, ellipse_of, polygon_of, window_mask
from .voc import parse_xml

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_SUBSET = re.compile(r"<image\s[^>]*?\bsubset=\"([^\"]+)\"")
_FRAME = re.compile("frame_([0-9]{1,9})")
IGNORED = {"tag"}  # classes of the whole image


class CvatSource(FileSource):
    """One split of a dataset in CVAT's own XML; see `FileSource`. Every shape counts with its extent."""

    format: ClassVar[str] = "cvat"
    suffixes: ClassVar[tuple[str, ...]] = (".xml",)

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return path.suffix.lower() == ".xml" and re.search(r"<annotations[\s>]", head_of(path)) is not None

    @classmethod
    def subsets(cls, path: Path) -> set[str]:
        return set(_SUBSET.findall(decode(read_regular(path))))

    def read_file(self, path: Path, split: Collector) -> None:
        root = parse_xml(path, split.issues, "annotations")
        if root is None:
            return
        rotated = self._read_tracks(root, path, split)
        for image in root.iter("image"):
            shapes = [shape for shape in image if shape.tag not in IGNORED]
            if not self.in_split(image.get("subset") or "", split, len(shapes)):
                continue
            name = image.get("name") or ""
            image_id = split.image(name.replace("\\", "/"), image.get("height"), image.get("width"))
            for index, shape in enumerate(shapes):
                rotated += _is_rotated(shape)
                record = f"image {name!r} {shape.tag}[{index}]"
                box = shape_extent(shape)
                size = to_numbers([image.get("height"), image.get("width")])
                mask = shape_mask(shape, box, size) if split.masks and box else None
                split.add(image_id, shape.get("label"), box, path, record, mask)
        with_rotated(split, rotated, path)

    def _read_tracks(self, root: "Element", path: Path, split: Collector) -> int:
        """Read the tracks of CVAT for video, whose frames are images/frame_000000.PNG and so on.

        Returns:
            The number of rotated boxes.
        """
        shapes = [(track, s) for track in root.iter("track") for s in track if s.get("outside") != "1"]
        if not shapes:
            return 0
        files = [file for file in sorted(walk_folder(self.image_root)) if is_image(file.relative_to(self.image_root))]
        frames = {int(match[1]): file for file in files if (match := _FRAME.fullmatch(file.stem))}
        numbers = [to_number(shape.get("frame")) for _, shape in shapes]
        if not frames.keys() >= set(numbers) or len({track.get("task_id") for track, _ in shapes}) > 1:
            message = (
                f"has {len(shapes)} shapes of CVAT for video without a frame_000000.PNG, … for each frame of one task"
            )
            hint = "export one task with its images, or as CVAT for images 1.1 or COCO 1.0"
            split.skip(path, "", message, hint, objects=len(shapes))
            return 0
        ids = {number: split.image(str(frames[number].relative_to(self.image_root))) for number in sorted(frames)}
        for (track, shape), number in zip(shapes, numbers, strict=True):
            record = f"track {track.get('id')} frame {shape.get('frame')}"
            box = shape_extent(shape)
            mask = shape_mask(shape, box, None) if split.masks and box else None
            split.add(ids[int(number or 0)], track.get("label"), box, path, record, mask)
        return sum(_is_rotated(shape) for _, shape in shapes)


def _is_rotated(shape: "Element") -> bool:
    return shape.tag == "box" and to_numbers([shape.get("rotation", 0)]) != [0]


def shape_extent(shape: "Element") -> list[float] | None:
    """Return the xywh box around a shape, None if its coordinates are not valid."""

    numbers = partial(_numbers, shape)
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


def shape_mask(shape: "Element", box: Sequence[float], size: list[float] | None) -> Segmentation | None:
    """Return the mask of a valid shape in an image of `size` (height, width), None for a box, a line or points.

    A mask has the lengths of runs of 0, 1, 0, … pixels in its box, row by row.
    """
    if shape.tag == "polygon":
        return polygon_of([list(map(float, point.split(",")[:2])) for point in shape.get("points", "").split(";")])
    if shape.tag == "ellipse" and (values := _numbers(shape, "cx", "cy", "rx", "ry", "rotation")):
        return ellipse_of((values[0], values[1]), (values[2], values[3]), values[4])
    runs = to_numbers(shape.get("rle", "").split(",")) if shape.tag == "mask" and size else None
    left, top, width, height = map(round, box)
    if runs is None or size is None or min(runs) < 0 or sum(runs) != width * height:
        return None
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, np.array(runs, dtype=np.int64)).reshape(height, width)
    return window_mask(pixels, left, top, (int(size[0]), int(size[1])))


def _numbers(shape: "Element", *keys: str) -> list[float] | None:
    return to_numbers([shape.get(key, 0 if key == "rotation" else None) for key in keys])
