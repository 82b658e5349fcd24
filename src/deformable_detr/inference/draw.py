"""Detections drawn on their image: boxes and labels by supervision, sizes and places chosen here.

Line width and font size follow the image, so that a picture reads the same whatever its resolution. Labels keep inside
the image and off each other where there is room. Classes have the colours of Okabe and Ito, which people with any
colour vision tell apart.
"""

from __future__ import annotations

import logging
import math
import warnings
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.images import read_image
from ..errors import UserError
from ..structures import Detections

if TYPE_CHECKING:
    from supervision import Detections as SupervisionDetections

_log = logging.getLogger(__name__)

PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
LEAST_SIDE = 320  # the long side of a drawn picture at least: smaller images are enlarged to have room for text
SMALLEST_FONT = 11
CROWDED, CROWDED_SHARE = 8, 0.4  # from so many boxes on, long names are shortened to that part of the width

Rectangle = tuple[int, int, int, int]


def draw(detections: Detections) -> Image.Image:
    """An RGB picture of the image with its detections.

    An image whose long side is under 320 pixels is enlarged by a whole factor; one without detections stays as it is.
    Raises UserError where the image cannot be read any more.
    """
    pixels = read_image(detections.image)
    if tuple(pixels.shape[1:]) != tuple(detections.image_size):
        raise UserError(f"{detections.path or 'the image'} has changed since its objects were detected; detect again")
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    if not len(detections):
        return picture

    factor = enlargement(picture.size)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return draw_on(picture, detections, factor)


def enlargement(size: tuple[int, int]) -> int:
    """The whole factor that brings a picture (width, height) to a long side of 320 pixels or more."""
    return math.ceil(LEAST_SIDE / max(size))


def draw_on(picture: Image.Image, detections: Detections, factor: int = 1) -> Image.Image:
    """Draws on the RGB picture itself, which is `factor` times as large as what the boxes are pixels of; returns it."""
    found = detections.to_supervision()
    found.xyxy = found.xyxy * factor
    _draw_boxes(picture, found)
    _draw_labels(picture, found, detections.names)
    return picture


def save(detections: Detections, path: Path) -> Path:
    """Writes `draw`'s picture in the format of the name's ending. Raises UserError where that cannot be done."""
    from ..weights.folder import replace_file

    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise UserError(f"{path}: no picture format has the ending '{path.suffix}'; use .png or .jpg")
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}  # text stays sharp
    picture = draw(detections)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: picture.save(temporary, kind, **options))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    return path


def load_supervision() -> ModuleType:
    """The library, without its hint to install OpenCV, which nothing here needs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*OpenCV.*", category=UserWarning)
        import supervision
    return supervision


def _draw_boxes(picture: Image.Image, found: SupervisionDetections) -> None:
    """Coloured lines on dark ones a little wider, which stand out from any background."""
    supervision = load_supervision()
    width = max(1, round(_scale(picture) / 260))
    limit = np.array([picture.width - 1, picture.height - 1] * 2)
    boxes = found.xyxy.round().clip(0, limit)  # the line on the image's border shows
    best_last = supervision.Detections(xyxy=boxes[::-1], class_id=_classes(found)[::-1])
    halo, palette = supervision.Color.from_hex("#1A1A1A"), supervision.ColorPalette.from_hex(list(PALETTE))
    supervision.BoxAnnotator(color=halo, thickness=width + 2).annotate(picture, best_last)
    supervision.BoxAnnotator(color=palette, thickness=width).annotate(picture, best_last)


def _classes(found: SupervisionDetections) -> np.ndarray:
    assert found.class_id is not None
    return found.class_id


def _draw_labels(picture: Image.Image, found: SupervisionDetections, names: tuple[str, ...]) -> None:
    """A label "name 0.93" for each detection: the best is placed first and drawn last."""
    supervision = load_supervision()
    size = _font_size(picture, len(found))
    file = font_file("".join(names))
    annotator = supervision.RichLabelAnnotator(
        color=supervision.ColorPalette.from_hex(list(PALETTE)),
        text_color=supervision.ColorPalette.from_hex([_ink(colour) for colour in PALETTE]),
        font_path=file,
        font_size=size,
        text_padding=max(1, size // 5),
    )
    measure = ImageDraw.Draw(picture)
    share = 1.0 if len(found) < CROWDED else CROWDED_SHARE
    room = max(share * picture.width, 8 * size) - 2 * annotator.text_padding
    room = min(room, picture.width - 2 * annotator.text_padding)
    labels, places = [], []
    assert found.confidence is not None
    for name, score, box in zip(names, found.confidence, found.xyxy, strict=True):
        label = _fitting(name, f"{score:.2f}", room, measure, annotator.font)
        left, top, right, bottom = measure.textbbox((0, 0), label, font=annotator.font)
        extent = (int(right - left) + 2 * annotator.text_padding, int(bottom - top) + 2 * annotator.text_padding)
        labels.append(label)
        places.append(_place(box, extent, picture.size, places))
    # supervision sets a label's lower left corner on the upper left one of its box: such boxes put it where we want it.
    anchors = np.array([(left, bottom, left + 1, bottom + 1) for left, _, _, bottom in places], dtype=np.float32)
    best_last = supervision.Detections(xyxy=anchors[::-1], class_id=_classes(found)[::-1])
    annotator.annotate(picture, best_last, labels=labels[::-1])


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
    name = " ".join(name.split())
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
    crowding = min(1.0, max(0.6, (12 / count) ** 0.25))
    return max(SMALLEST_FONT, round(_scale(picture) / 34 * crowding))


def _ink(colour: str) -> str:
    """Black or white, whichever reads better on the colour (relative luminance as in WCAG 2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#FFFFFF"


@lru_cache(maxsize=64)
def font_file(text: str) -> str | None:
    """The installed font that has the most of the text's characters, DejaVu Sans where none has more.

    None where no font can be used: Pillow's own, which knows Latin letters only.
    """
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    wanted = {ord(letter) for letter in text + "0123456789." if not letter.isspace()}
    default = font_manager.findfont("DejaVu Sans")
    regular = [
        font.fname
        for font in font_manager.fontManager.ttflist
        if font.style == "normal"
        and font.weight in (400, "normal", "regular")
        and not font.name.startswith("Last Resort")  # claims every character and draws a box for it
    ]
    best, most = None, -1
    for path in [default, *sorted(set(regular))]:
        try:
            known = len(wanted & FT2Font(path).get_charmap().keys())
            if known > most:
                ImageFont.truetype(path, 12).getmask("0")
        except (OSError, RuntimeError):
            continue  # a listed font that is gone, or of bitmaps only
        if known > most:
            best, most = path, known
        if most == len(wanted):
            break
    if most < len(wanted):
        _log.warning("no installed font has all letters of the class names; some are drawn as empty boxes")
    return best
