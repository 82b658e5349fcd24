"""Rows of YOLO label files."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from ..utils.errors import UserError
from .annotation_files import to_number, to_numbers
from .source import read_lines

ROUNDING = 0.01  # how far outside 0..1 a value may be
Box = tuple[float, float, float, float]


def read_row(line: str, num_classes: int, keypoints: int = 0) -> tuple[int, Box]:
    """Parse one row of a label file.

    Args:
        line: `class cx cy w h`, or `class` and a polygon.
        num_classes: Number of classes.
        keypoints: Number of values that must follow `class cx cy w h`; polygons are then not allowed.

    Returns:
        The class and the xyxy box in 0..1.

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
        return int(label), (min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2]))
    cx, cy, w, h = numbers
    return int(label), (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)


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
