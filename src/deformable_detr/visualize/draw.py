"""Draw detections on images.

Line width and font size scale with the image. Labels stay inside the image and avoid each other where possible. With
masks, they also avoid the small ones, and the last labels are left out where there is no room. Class colors are those
of Okabe and Ito, which are distinct for people with any color vision.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..utils.errors import UserError
from ..utils.files import write_files
from ..utils.images import read_image
from .fonts import legible
from .masks import HALO, draw_masks, shade, tint

if TYPE_CHECKING:
    from ..structures import Detections

PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
NOTEBOOK_SIDE = 1000  # pixels; the longest side of a picture that a notebook shows
NO_TRACK = "#BBBBBB"  # of detections that the tracker has not confirmed
MIN_LONG_SIDE = 320  # pixels; smaller images are enlarged to make room for text
MIN_FONT_SIZE = 11
SMALL = 16  # labels avoid masks whose boxes have less than this times the font size squared
MAX_LABELED = 0.15  # with masks, labels cover at most this part of the image, so that the masks stay visible
CROWDED, CROWDED_WIDTH = 8, 0.4  # from 8 boxes on, labels take at most this share of the image width

Rectangle = tuple[int, int, int, int]
_log = logging.getLogger(__name__)


def draw(detections: Detections) -> Image.Image:
    """Return an RGB image with the detections drawn on it.

    Images with a long side under 320 pixels are enlarged by an integer factor; images without detections are returned
    unchanged. Raises UserError if the image cannot be read again or has changed.
    """
    pixels = read_image(detections.image)
    if tuple(pixels.shape[1:]) != tuple(detections.image_size):
        raise UserError(f"{detections.path or 'the image'} has changed since the prediction; run it again")
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    if not len(detections.boxes):
        return image
    factor = enlargement(image.size)
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return draw_on(image, detections, factor)


def enlargement(size: tuple[int, int]) -> int:
    """Return the integer factor that enlarges (width, height) to a long side of at least 320 pixels."""
    return math.ceil(MIN_LONG_SIDE / max(size))


def draw_on(image: Image.Image, detections: Detections, factor: int = 1) -> Image.Image:
    """Draw on an RGB image in place and return it; the boxes are multiplied by `factor`."""
    boxes = detections.boxes.numpy() * factor
    colors = _colors(detections)
    if detections.segmentations is None:
        _draw_boxes(image, boxes, colors)
    else:
        draw_masks(image, detections.segmentations, boxes, colors, factor)
    _draw_labels(image, boxes, detections, colors)
    return image


def _colors(detections: Detections) -> list[str]:
    """Return the color of each class, of each object if there are masks, or of each track."""
    if detections.track_ids is not None:
        return [NO_TRACK if track < 0 else _color(track) for track in detections.track_ids.tolist()]
    labels = detections.labels.tolist()
    if detections.segmentations is None:
        return [_color(label) for label in labels]
    return shade([PALETTE[label % len(PALETTE)] for label in labels], detections.boxes.numpy())


def _color(number: int) -> str:
    """Return one of 21 colors: after seven, their lighter shades, then their darker ones."""
    return tint(PALETTE[number % len(PALETTE)], number // len(PALETTE))


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


def png_for_notebook(paint: Callable[[], Image.Image]) -> bytes | None:
    """Return a picture as PNG, at most `NOTEBOOK_SIDE` pixels long; None, with a warning, if it cannot be drawn."""
    try:
        image = paint()
    except UserError as error:
        _log.warning("no picture: %s", error)
        return None
    image.thumbnail((NOTEBOOK_SIDE, NOTEBOOK_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _draw_boxes(image: Image.Image, boxes: np.ndarray, colors: list[str]) -> None:
    """Draw colored lines with dark rims, which are visible on any background; the best box is drawn last."""
    width = max(1, round(_scale(image) / 260))
    limit = np.array([image.width - 1, image.height - 1] * 2)
    corners = boxes.round().clip(0, limit).astype(int)  # keeps lines at the border visible
    pen = ImageDraw.Draw(image)
    for rim in (1, 0):
        offset = width // 2 + rim
        for (x1, y1, x2, y2), color in zip(corners[::-1].tolist(), colors[::-1], strict=True):
            line = HALO if rim else color
            pen.rectangle((x1 - offset, y1 - offset, x2 + offset, y2 + offset), outline=line, width=width + 2 * rim)


def _draw_labels(image: Image.Image, boxes: np.ndarray, detections: Detections, colors: list[str]) -> None:
    """Draw a label "name 0.93" per detection, with tracks "#7 name 0.93"; the best is placed first, drawn last."""
    size = _font_size(image, len(boxes))
    has_masks = detections.segmentations is not None
    is_small = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) < SMALL * size**2
    masked = boxes[is_small & has_masks].round()
    padding = max(1, size // 5)
    pen = ImageDraw.Draw(image)
    share = 1.0 if len(boxes) < CROWDED else max(0.15, CROWDED_WIDTH * (CROWDED / len(boxes)) ** 0.3)
    max_width = min(max(int(share * image.width), 8 * size), image.width) - 2 * padding
    texts, places, room = [], [], MAX_LABELED * image.width * image.height
    tracks = [-1] * len(boxes) if detections.track_ids is None else detections.track_ids.tolist()
    columns = (detections.names, detections.category_ids.tolist(), detections.scores.tolist(), boxes, tracks)
    for name, category, score, box, track in zip(*columns, strict=True):
        name, file = legible(name, f"class {category}")
        font = _font(file, size)
        text = _shorten("" if track < 0 else f"#{track} ", name, f"{score:.2f}", max_width, pen, font)
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font, anchor="ls")
        # The same height for all labels, unless a letter exceeds it.
        top, bottom = math.floor(min(top, -0.92 * size)), math.ceil(max(bottom, 0.26 * size))
        extent = (math.ceil(right - left) + 2 * padding, bottom - top + 2 * (padding // 2))
        room -= extent[0] * extent[1]
        if has_masks and places and room < 0:
            break
        places.append(_place_label(box, extent, image.size, places, masked))
        texts.append((text, font, padding - left, padding // 2 - top))
    order = list(zip(places, texts, colors[: len(places)], strict=True))
    for (x1, y1, x2, y2), (text, font, right, down), color in reversed(order):
        pen.rectangle((x1, y1, x2 - 1, y2 - 1), fill=color)
        pen.text((x1 + right, y1 + down), text, fill=_ink(color), font=font, anchor="ls")


@lru_cache(maxsize=64)
def _font(file: str | None, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size) if file is None else ImageFont.truetype(file, size)


def _place_label(
    box: np.ndarray, extent: tuple[int, int], size: tuple[int, int], taken: list[Rectangle], masked: np.ndarray
) -> Rectangle:
    """Return the first place above, in, under or near the box that covers the least of labels and small masks."""
    x1, y1, x2, y2 = (int(v) for v in box.round())
    width, height = extent
    columns = (x1, x2 - width, (x1 + x2 - width) // 2, x1 - width, x2)
    rows = (y1 - height, y1, y2, y2 - height, (y1 + y2 - height) // 2, y1 - 2 * height, y2 + height)
    corners = np.array([(x, y) for y in rows for x in columns])
    corners = np.minimum(corners, np.array(size) - extent).clip(min=0)
    places = np.concatenate([corners, corners + extent], axis=1)
    covered = _overlaps(places, np.array(taken).reshape(-1, 4)) + 0.5 * _overlaps(places, masked)
    left, top, right, bottom = places[covered.argmin()].tolist()
    return left, top, right, bottom


def _overlaps(places: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return how many pixels of each place other rectangles cover."""
    low = np.maximum(places[:, None, :2], others[:, :2])
    high = np.minimum(places[:, None, 2:], others[:, 2:])
    return (high - low).clip(min=0).prod(axis=2).sum(axis=1)


def _shorten(
    start: str, name: str, score: str, max_width: int, pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> str:  # fmt: skip
    """Return the label, its name shortened to fit the width; without the name if nothing else fits."""
    for length in range(len(name), 0, -1):
        label = f"{start}{name[:length].rstrip()}{'…' if length < len(name) else ''} {score}"
        if pen.textlength(label, font=font) <= max_width:
            return label
    return start + score


def _scale(image: Image.Image) -> float:
    """Return the side of a square with the image's area; for narrow strips, at most three times their width."""
    return min(math.sqrt(image.width * image.height), 3 * min(image.size))


def _font_size(image: Image.Image, count: int) -> int:
    """Return the font size in pixels; many labels are smaller."""
    crowding = min(1.0, max(0.35, (12 / count) ** 0.35))
    return max(MIN_FONT_SIZE, round(_scale(image) / 34 * crowding))


def _ink(color: str) -> str:
    """Return black or white, whichever has more contrast to the color (relative luminance as in WCAG 2)."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#FFFFFF"
