"""Decode the images of clients: only known formats, with the size checked before pixels are decoded."""

import io
import re

from PIL import Image
from starlette.exceptions import HTTPException
from torch import Tensor

from ..utils.errors import UserError
from ..utils.images import read_image

# Formats that browsers show. TIFF is a container of many decoders, and browsers cannot show it.
FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "BMP": "image/bmp", "GIF": "image/gif"}
_SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"(?s)RIFF.{4}WEBP",
    "BMP": rb"BM",
    "GIF": rb"GIF8[79]a",
}
LARGE_IMAGE = 13_000_000  # pixels, over those of a 12-megapixel camera; larger images are decoded one at a time
# Every scan of a progressive JPEG passes over all pixels. Encoders write about ten; a decompression bomb has thousands.
MAX_SCANS, MAX_SEGMENTS = 100, 10_000
_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")  # without restart markers and stuffed bytes


def open_image(data: bytes | bytearray, name: str, max_pixels: int) -> Image.Image:
    """Return the image with its header read and nothing decoded.

    Args:
        data: The file.
        name: What errors call the image.
        max_pixels: Maximum width × height.

    Raises:
        HTTPException: 415 for a format that is not in `FORMATS`, 413 for too many pixels, 422 for a broken header.
    """
    content = bytes(data)
    if not content:
        raise HTTPException(422, f"{name}: is empty")
    kind = next((kind for kind, signature in _SIGNATURES.items() if re.match(signature, content)), None)
    if kind is None:
        raise HTTPException(415, f"{name}: unsupported format; send {', '.join(FORMATS)}")
    if kind == "WEBP":  # Pillow allocates all pixels before it reports the size
        _check_size(name, *_webp_size(content, name), max_pixels)
    if kind == "BMP" and len(content) > 34 and content[14] >= 40 and content[30] in (1, 2):  # a slow decoder in Python
        raise HTTPException(422, f"{name}: BMP with run-length encoding is not supported; save it uncompressed")
    if kind == "JPEG" and _count_scans(content) > MAX_SCANS:
        raise HTTPException(422, f"{name}: JPEG with over {MAX_SCANS} scans; save it again")
    try:
        image = Image.open(io.BytesIO(content), formats=[kind])
    except Image.DecompressionBombError as error:
        raise HTTPException(413, f"{name}: {error}") from None
    except Exception:  # decoders raise many types of errors for broken files
        raise HTTPException(422, f"{name}: cannot be read as {kind} (broken header)") from None
    _check_size(name, *image.size, max_pixels)
    return image


def decode(image: Image.Image, name: str) -> Tensor:
    """Return uint8 RGB (3, H, W), upright, as `predict` reads it. Raises HTTPException (422) if the file is damaged."""
    try:
        return read_image(image)
    except UserError as error:
        detail = str(error).removeprefix("the PIL image: ").removesuffix("; replace or remove it")
        raise HTTPException(422, f"{name}: {detail}") from None


def _count_scans(data: bytes) -> int:
    """The scans of a JPEG. Data after its end, such as the video of a motion photo, is ignored."""
    scans, position = 0, 2
    for _ in range(MAX_SEGMENTS):
        match = _JPEG_MARKER.search(data, position)
        if match is None or data[match.end() - 1] == 0xD9:
            return scans
        scans += data[match.end() - 1] == 0xDA
        position = match.end() + max(2, int.from_bytes(data[match.end() : match.end() + 2]))
    return MAX_SCANS + 1


def _check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        limit = f"images may have up to {max_pixels / 1e6:g} megapixels"
        raise HTTPException(413, f"{name}: {limit}; this one has {width} × {height} pixels")
    if width < 1 or height < 1:
        raise HTTPException(422, f"{name}: has no pixels ({width} × {height})")


def _webp_size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) in the header of the three kinds of WebP (RFC 9649, sections 2.5 to 2.7 and 3.4)."""
    kind = data[12:16]
    if len(data) >= 30:
        if kind == b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        if kind == b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if kind == b"VP8 ":
            return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    raise HTTPException(422, f"{name}: cannot be read as WEBP (broken header)")
