"""From a client's bytes to pixels: only known formats, sizes by the header first, nothing that takes for ever."""

from __future__ import annotations

import io
import re

from PIL import Image
from torch import Tensor

from ..utils.errors import UserError
from ..utils.images import read_image
from .limits import HttpError

# What browsers show too. No TIFF: many readers in one, and no browser could draw boxes on it.
FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "BMP": "image/bmp", "GIF": "image/gif"}
LARGE = 12_000_000  # pixels; larger images are decoded one at a time
# A progressive JPEG passes over all its pixels for each scan. Encoders write about ten; a bomb has thousands.
MOST_SCANS = 100
MOST_SEGMENTS = 10_000
# Of a segment: none between the bits of a scan, no restart. Those under C0 are of none: decoders pass over them.
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")


def sniff(data: bytes | bytearray | memoryview) -> str | None:
    """Pillow's name of the format that the first bytes tell, where it is one of FORMATS."""
    head = bytes(data[:16])
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    return "BMP" if head.startswith(b"BM") else None


def open_picture(data: bytes | bytearray | memoryview, name: str, most_pixels: int) -> Image.Image:
    """The picture with its header read and nothing decoded.

    name: how messages call it. most_pixels: width × height at most.
    Raises Refused: 415 for a format that is none of FORMATS, 413 for too many pixels, 422 for a broken header.
    """
    if not len(data):
        raise HttpError(422, f"{name}: is empty")
    kind = sniff(data)
    if kind is None:
        raise HttpError(415, f"{name}: not a format that is read here; send {', '.join(FORMATS)}")
    whole = bytes(data)
    if kind == "WEBP":  # Pillow takes memory for all pixels before it tells how many there are
        _check_size(name, *_webp_size(whole, name), most_pixels)
    if kind == "BMP" and len(whole) > 34 and whole[14] >= 40 and whole[30] in (1, 2):  # decoded in Python, slowly
        raise HttpError(422, f"{name}: a BMP with run lengths is not read; save it without")
    if kind == "JPEG" and _scans(whole) > MOST_SCANS:
        raise HttpError(422, f"{name}: a JPEG with over {MOST_SCANS} scans; save it again")
    try:
        image = Image.open(io.BytesIO(whole), formats=[kind])
    except Image.DecompressionBombError:
        raise HttpError(413, _too_large(name, most_pixels)) from None
    except Exception as error:  # decoders raise whatever they like on broken bytes
        raise HttpError(422, f"{name}: cannot be read as {kind} ({_reason(error)})") from None
    _check_size(name, *image.size, most_pixels)
    return image


def _scans(data: bytes) -> int:
    """Scans of a JPEG's picture; what follows its end, such as the film of a motion photo, is not looked at."""
    scans, position = 0, 2
    for _ in range(MOST_SEGMENTS):
        found = _MARKER.search(data, position)
        if found is None or data[found.end() - 1] == 0xD9:
            return scans
        scans += data[found.end() - 1] == 0xDA
        position = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2]))
    return MOST_SCANS + 1


def decode(image: Image.Image, name: str) -> Tensor:
    """uint8 RGB (3, H, W), upright, as prediction reads it. Raises Refused (422) where the file is not whole."""
    try:
        return read_image(image)
    except UserError as error:
        detail = str(error).removeprefix("the PIL image: ").removesuffix("; replace or remove it")
        raise HttpError(422, f"{name}: {detail}") from None


def _check_size(name: str, width: int, height: int, most_pixels: int) -> None:
    if width * height > most_pixels:
        raise HttpError(413, f"{_too_large(name, most_pixels)}, not {width} × {height}")
    if width < 1 or height < 1:
        raise HttpError(422, f"{name}: has no pixels ({width} × {height})")


def _too_large(name: str, most_pixels: int) -> str:
    return f"{name}: may have {most_pixels / 1e6:g} megapixels at most"


def _webp_size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) by the header of any of WebP's three kinds (RFC 9649, sections 2.5 to 2.7 and 3.4)."""
    kind = data[12:16]
    if len(data) >= 30:
        if kind == b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        if kind == b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if kind == b"VP8 ":
            return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    raise HttpError(422, f"{name}: cannot be read as WEBP (broken header)")


def _reason(error: Exception) -> str:
    # Pillow's own "cannot identify image file <_io.BytesIO object at …>" says nothing.
    return "broken header" if isinstance(error, Image.UnidentifiedImageError) else " ".join(str(error).split())[:200]
