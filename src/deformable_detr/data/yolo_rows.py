"""Rows of YOLO label files."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.errors import UserError
from .annotation_files import to_number, to_numbers
from .source import read_lines

ROUNDING = 0.01  # how far outside 0..1 a value may be
Box = tuple[float, float, float, float]
Row = tuple[int, Box, list[float]]  # class, xyxy box and polygon


def read_row(line: str, num_classes: int, keypoints: int = 0) -> Row:
    """Parse one row of a label file.

    Args:
        line: `class cx cy w h`, or `class` and a polygon.
        num_classes: Number of classes.
        keypoints: Number of values that must follow `class cx cy w h`; polygons are then not allowed.

    Returns:
        The class, the xyxy box in 0..1, and the polygon x, y, … in 0..1; [] for a row with a box.

    Raises:
        ValueError: Says what is wrong with the row.
    """
    parts = split_row(line)
    parts = parts[: len(parts) - count_extra(parts, keypoints)]
    if keypoints and len(parts) != 5 + keypoints:
        raise ValueError(f"has {len(parts)} values instead of class cx cy w h and {keypoints} keypoint values")
    points, rest = divmod(len(parts) - 5, 3)
    if not keypoints and not rest and (points > 2 or "2" in parts[7::3]) and set(parts[7::3]) <= {"0", "1", "2"}:
        raise ValueError(f"has {points} keypoints after its box; set kpt_shape: [{points}, 3] in data.yaml")
    if not keypoints and len(parts) != 5 and (len(parts) < 7 or len(parts) % 2 == 0):
        raise ValueError(f"has {len(parts)} values instead of class cx cy w h (or class and a polygon's x y …)")
    try:
        values = [float(part) for part in parts]
    except ValueError:
        raise ValueError(f"has {line.strip()[:40]!r} instead of numbers") from None
    if not all(map(math.isfinite, values)):
        raise ValueError("has a value that is not a finite number")
    label, *numbers = values[: len(values) - keypoints]
    if label != int(label) or not 0 <= label < num_classes:
        raise ValueError(f"has class {parts[0]}, but the classes are 0 to {num_classes - 1}")
    signed = [*numbers[:2], *map(abs, numbers[2:])] if len(numbers) == 4 else numbers  # a width may be negative
    if min(signed) < -ROUNDING or max(signed) > 1 + ROUNDING:
        more = ", or set kpt_shape in data.yaml for keypoints" if len(numbers) > 4 else ""
        hint = f"divide pixels by the image's width and height, or percent by 100{more}"
        raise ValueError(f"has values outside 0..1 ({hint})")
    if len(numbers) > 4:
        return int(label), (min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])), numbers
    cx, cy, w, h = numbers
    return int(label), (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), []


@dataclass
class KeypointEvidence:
    """Counts the rows that may be a box with keypoints although no `kpt_shape` says so.

    A polygon has other numbers of points in other rows; and only by chance are all its points inside the box that its
    first four values would be.
    """

    rows: int = 0
    length: int = 0
    plain: int = 0  # rows with only a box
    fits: Counter[int] = field(default_factory=Counter)  # 2 or 3 values per keypoint → rows
    apart: int = 0  # rows whose second point as a polygon would be outside of that box

    def add(self, line: str) -> None:
        """Count a valid row."""
        if self.length < 0:
            return
        numbers = to_numbers(split_row(line)[1:]) or []
        if len(numbers) < 6:
            self.plain += 1
            return
        self.rows += 1
        self.length = len(numbers) if self.length in (0, len(numbers)) else -1
        x, y, w, h = numbers[:4]

        def is_inside(px: float, py: float, visible: float = 1) -> bool:
            return not visible or px == py == 0 or max(abs(px - x) - w / 2, abs(py - y) - h / 2) <= ROUNDING

        parallelogram = len(numbers) == 8 and all(
            abs(numbers[axis] + numbers[4 + axis] - numbers[2 + axis] - numbers[6 + axis]) < ROUNDING for axis in (0, 1)
        )
        if numbers[-2:] == numbers[:2] or parallelogram:
            return
        self.apart += not is_inside(w, h)
        for size in (2, 3):
            points = list(zip(*[iter(numbers[4:])] * size, strict=False))
            seen = all(point[2] in (0, 1, 2) for point in points) if size == 3 else True
            self.fits[size] += seen and len(points) * size == len(numbers) - 4 and all(is_inside(*p) for p in points)

    def shape(self) -> tuple[int, int, bool] | None:
        """Return the number of keypoints, of values of each, and whether it is certain; None for polygons."""
        size = next((size for size in (3, 2) if self.fits[size] > 0.95 * self.rows), 0)
        if self.length <= 0 or not size:
            return None
        certain = self.rows > 2 and not self.plain and (size == 3 or 2 * self.apart > self.rows)
        likely = size == 3 or self.rows > 2 or self.apart
        return ((self.length - 4) // size, size, certain) if likely else None


def split_row(line: str) -> list[str]:
    """Split a row at blanks, tabs, commas and semicolons. Numbers may have decimal commas, then none has a point."""
    if "." not in line and re.search(r"\d,\d", line) and re.search(r"[;\s]", line.strip()):
        line = line.replace(",", ".")
    return re.split(r"[\s,;]+", line.strip(" \t,;"))


def count_extra(parts: Sequence[str], keypoints: int = 0) -> int:
    """Count the values after a box in predictions: a confidence in 0..1, a track id from 1, or both in this order."""
    more = parts[5:] if not keypoints and len(parts) <= 7 else []
    is_id = bool(more) and more[-1].isdecimal() and more[-1] != "0"
    confidence = to_number(more[0]) if len(more) == 1 + is_id else None
    if confidence is not None and 0 <= confidence <= 1:
        return len(more)
    return int(is_id and len(more) == 1)


def count_rows(path: Path) -> int | None:
    """Return the number of rows of a label file, valid or not: a class and at least 4 numbers. None for other text."""
    try:
        lines = [split_row(line) for line in read_lines(path) if line.strip()]
    except UserError:
        return None
    rows = sum(len(parts) > 4 and to_numbers(parts[1:]) is not None for parts in lines)
    return rows if rows or not lines else None
