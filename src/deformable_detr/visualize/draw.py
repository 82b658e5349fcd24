"""Detections drawn on their image.

Line width and font size follow the image, so that a picture reads the same whatever its resolution. Labels keep inside
the image and off each other where there is room. Classes have the colors of Okabe and Ito, which people with any
color vision tell apart.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..utils.errors import UserError
from ..utils.files import write_files
from ..utils.images import read_image
from .fonts import legible

HALO = "#1A1A1A"
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
LEAST_SIDE = 320  # the long side of a drawn picture at least: smaller images are enlarged to have room for text
SMALLEST_FONT = 11
CROWDED, CROWDED_SHARE = 8, 0.4  # from so many boxes on, long names are shortened to that part of the width or less

Rectangle = tuple[int, int, int, int]


class Drawable(Protocol):
    """What `draw` needs of `structures.Detections`, whose docstring describes each field."""

    @property
    def boxes(self) -> Tensor: ...
    @property
    def scores(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def category_ids(self) -> Tensor: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def image_size(self) -> tuple[int, int]: ...
    @property
    def image(self) -> Any: ...
    @property
    def path(self) -> str | None: ...


def draw(detections: Drawable) -> Image.Image:
    """An RGB picture of the image with its detections.

    An image whose long side is under 320 pixels is enlarged by a whole factor; one without detections stays as it is.
    Raises UserError where the image cannot be read any more.
    """
    pixels = read_image(detections.image)
    if tuple(pixels.shape[1:]) != tuple(detections.image_size):
        raise UserError(f"{detections.path or 'the image'} has changed since its objects were detected; detect again")
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    if not len(detections.boxes):
        return picture

    factor = enlargement(picture.size)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return draw_on(picture, detections, factor)


def enlargement(size: tuple[int, int]) -> int:
    """The whole factor that brings a picture (width, height) to a long side of 320 pixels or more."""
    return math.ceil(LEAST_SIDE / max(size))


def draw_on(picture: Image.Image, detections: Drawable, factor: int = 1) -> Image.Image:
    """Draws on the RGB picture itself, which is `factor` times as large as what the boxes are pixels of; returns it."""
    boxes = detections.boxes.numpy() * factor
    _draw_boxes(picture, boxes, detections.labels.tolist())
    _draw_labels(picture, boxes, detections)
    return picture


def save(detections: Drawable, path: Path) -> Path:
    """Draw the detections and write the image in the format of the file extension. Raises UserError if that fails."""
    image_format(path)
    return save_image(draw(detections), path)


def image_format(path: Path) -> str:
    """Return Pillow's name of the format of a file extension. Raises UserError if Pillow cannot write it."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise UserError(f"{path}: '{path.suffix}' is not an image format; use .png or .jpg")
    return kind


def save_image(image: Image.Image, path: Path, **options: Any) -> Path:
    """Write an image in the format of the file extension, creating its folder. Raises UserError if that fails."""
    kind = image_format(path)
    if kind == "JPEG":
        options = {"quality": 95, "subsampling": 0, **options}  # text stays sharp
    write_files(path.parent, {path.name: lambda temporary: image.save(temporary, kind, **options)})
    return path


def _draw_boxes(picture: Image.Image, boxes: np.ndarray, labels: list[int]) -> None:
    """Colored lines on dark ones a little wider, which stand out from any background; the best box is drawn last."""
    width = max(1, round(_scale(picture) / 260))
    limit = np.array([picture.width - 1, picture.height - 1] * 2)
    corners = boxes.round().clip(0, limit).astype(int)  # the line on the image's border shows
    pen = ImageDraw.Draw(picture)
    for rim in (1, 0):
        out = width // 2 + rim
        for (x1, y1, x2, y2), label in zip(corners[::-1].tolist(), labels[::-1], strict=True):
            color = HALO if rim else PALETTE[label % len(PALETTE)]
            pen.rectangle((x1 - out, y1 - out, x2 + out, y2 + out), outline=color, width=width + 2 * rim)


def _draw_labels(picture: Image.Image, boxes: np.ndarray, detections: Drawable) -> None:
    """A label "name 0.93" for each detection: the best is placed first and drawn last."""
    size = _font_size(picture, len(boxes))
    padding = max(1, size // 5)
    pen = ImageDraw.Draw(picture)
    share = 1.0 if len(boxes) < CROWDED else max(0.15, CROWDED_SHARE * (CROWDED / len(boxes)) ** 0.3)
    room = min(max(int(share * picture.width), 8 * size), picture.width) - 2 * padding
    written, places = [], []
    facts = (detections.names, detections.category_ids.tolist(), detections.scores.tolist(), boxes)
    for name, category, score, box in zip(*facts, strict=True):
        name, file = legible(name, f"class {category}")
        font = _font(file, size)
        text = _fitting(name, f"{score:.2f}", room, pen, font)
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font, anchor="ls")
        # From the top of a capital with an accent to the foot of a g, further only where the letters need it.
        top, bottom = math.floor(min(top, -0.92 * size)), math.ceil(max(bottom, 0.26 * size))
        extent = (math.ceil(right - left) + 2 * padding, bottom - top + 2 * (padding // 2))
        places.append(_place(box, extent, picture.size, places))
        written.append((text, font, padding - left, padding // 2 - top))
    order = list(zip(places, written, detections.labels.tolist(), strict=True))
    for (x1, y1, x2, y2), (text, font, right, down), label in reversed(order):
        color = PALETTE[label % len(PALETTE)]
        pen.rectangle((x1, y1, x2 - 1, y2 - 1), fill=color)
        pen.text((x1 + right, y1 + down), text, fill=_ink(color), font=font, anchor="ls")


@lru_cache(maxsize=64)
def _font(file: str | None, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size) if file is None else ImageFont.truetype(file, size)


def _place(box: np.ndarray, extent: tuple[int, int], size: tuple[int, int], taken: list[Rectangle]) -> Rectangle:
    """Where a label goes: above its box, else in it, under it, near it: the first place that covers no other label."""
    x1, y1, x2, y2 = (int(v) for v in box.round())
    width, height = extent
    columns = (x1, x2 - width, (x1 + x2 - width) // 2, x1 - width, x2)
    rows = (y1 - height, y1, y2, y2 - height, (y1 + y2 - height) // 2, y1 - 2 * height, y2 + height)
    corners = np.array([(x, y) for y in rows for x in columns])
    corners = np.minimum(corners, np.array(size) - extent).clip(min=0)
    places = np.concatenate([corners, corners + extent], axis=1)
    others = np.array(taken).reshape(-1, 4)
    low = np.maximum(places[:, None, :2], others[:, :2])
    high = np.minimum(places[:, None, 2:], others[:, 2:])
    covered = (high - low).clip(min=0).prod(axis=2).sum(axis=1)  # the first of the least
    left, top, right, bottom = places[covered.argmin()].tolist()
    return left, top, right, bottom


def _fitting(
    name: str, score: str, room: int, measure: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> str:
    """The label, its name shortened where it is wider than the image, down to the score alone."""
    for length in range(len(name), 0, -1):
        label = f"{name[:length].rstrip()}{'…' if length < len(name) else ''} {score}"
        if measure.textlength(label, font=font) <= room:
            return label
    return score


def _scale(picture: Image.Image) -> float:
    """A length that says how large the picture is: the side of a square as large; of a strip, three times its width."""
    return min(math.sqrt(picture.width * picture.height), 3 * min(picture.size))


def _font_size(picture: Image.Image, count: int) -> int:
    """In pixels; smaller where there are many labels."""
    crowding = min(1.0, max(0.35, (12 / count) ** 0.35))
    return max(SMALLEST_FONT, round(_scale(picture) / 34 * crowding))


def _ink(color: str) -> str:
    """Black or white, whichever reads better on the color (relative luminance as in WCAG 2)."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#FFFFFF"
