"""Image files, valid and damaged, and the issues that each leads to."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from tests.support.datasets import SIZE

PIXELS = np.random.default_rng(5).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)


def encoded(kind, image=IMAGE, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width, height):
    """A PNG whose header promises these sides."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def gray(highest):
    """A PNG of 16 bits."""
    values = np.linspace(0, highest, SIZE[0] * SIZE[1]).reshape(SIZE[::-1])
    return encoded("PNG", Image.fromarray(values.astype(np.uint16)))


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found


PNG, JPEG = encoded("PNG"), encoded("JPEG", quality=95)
TURNED = encoded("JPEG", IMAGE.transpose(Image.Transpose.ROTATE_90), exif=exif(6))
STORED = encoded("JPEG", exif=exif(6))
MODES = ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F")
BROKEN = {"image-unreadable"}

# What lies at train/a.png → the kinds that are found.
FILES = {
    "nothing in it": (b"", BROKEN),
    "text": (b"not an image\n", BROKEN),
    "a web page": (b"<!doctype html><html><body>404</body></html>", BROKEN),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n", BROKEN),
    "a ZIP file": (b"PK\x03\x04" + bytes(200), BROKEN),
    "a NumPy file": (b"\x93NUMPY\x01\x00" + bytes(200), BROKEN),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20"/>', BROKEN),
    "PDF": (b"%PDF-1.4\n%%EOF\n", BROKEN),
    "zeros": (bytes(5000), BROKEN),
    "PNG: signature only": (PNG[:8], BROKEN),
    "PNG: header only": (PNG[:33], BROKEN),
    "PNG: half": (PNG[: len(PNG) // 2], BROKEN),
    "PNG: last tenth missing": (PNG[: len(PNG) * 9 // 10], BROKEN),
    "PNG: header's checksum wrong": (PNG[:29] + b"\0\0\0\0" + PNG[33:], BROKEN),
    "PNG: bytes changed inside": (PNG[:200] + bytes(50) + PNG[250:], BROKEN),
    "PNG: no side": (png_of(0, 20), BROKEN),
    "PNG: fewer rows than promised": (png_of(40, 20), BROKEN),
    "PNG: above the limit of pixels": (png_of(10_000, 9_000), BROKEN),
    "PNG: a bomb": (png_of(60_000, 60_000), BROKEN),
    "PNG: sides beyond sense": (png_of(2**31 - 1, 2**31 - 1), BROKEN),
    "JPEG: start only": (JPEG[:4], BROKEN),
    "JPEG: headers only": (JPEG[:300], BROKEN),
    "JPEG: half": (JPEG[: len(JPEG) // 2], BROKEN),
    "GIF: half": (encoded("GIF")[:100], BROKEN),
    "BMP: half": (encoded("BMP")[:1000], BROKEN),
    "TIFF: half": (encoded("TIFF")[:1000], BROKEN),
    "WebP: half": (encoded("WEBP")[:200], BROKEN),
    "another size than the record's": (encoded("PNG", IMAGE.resize((80, 40))), {"image-size"}),
    "one pixel": (encoded("PNG", IMAGE.resize((1, 1))), {"image-size", "box-outside"}),
    "record before the EXIF rotation": (STORED, {"image-rotated", "box-outside"}),
    "record after the EXIF rotation": (TURNED, set()),
    "EXIF upside down": (encoded("JPEG", exif=exif(3)), set()),
    "EXIF orientation out of range": (encoded("JPEG", exif=exif(99)), set()),
    "EXIF that is no EXIF": (encoded("JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), set()),
    "PNG with bytes after its end": (PNG + b"more" * 100, set()),
    "JPEG with bytes after its end": (JPEG + b"more" * 100, set()),
    "JPEG in a PNG's name": (JPEG, set()),
    "a film": (encoded("GIF", save_all=True, append_images=[IMAGE.rotate(90)]), set()),
    "several pages": (encoded("TIFF", save_all=True, append_images=[IMAGE]), set()),
    "BMP": (encoded("BMP"), set()),
    "WebP": (encoded("WEBP"), set()),
    "progressive JPEG": (encoded("JPEG", progressive=True), set()),
    "PNG with a transparent color": (encoded("PNG", transparency=(1, 2, 3)), set()),
    "16 bits": (gray(65535), set()),
    "13 bits": (gray(8191), set()),
    "12 bits of 16": (gray(4095), {"image-dim"}),
    "12 bits of 16, hardly used": (gray(100), {"image-dim"}),
    "8 bits, almost black": (encoded("PNG", IMAGE.point(lambda value: value // 32)), set()),
    **{
        f"mode {mode}": (
            encoded("TIFF" if mode in ("LAB", "CMYK", "F", "YCbCr", "I") else "PNG", image),
            {"image-dim"} if mode == "I" else set(),
        )
        for mode, image in (
            (mode, Image.new(mode, SIZE) if mode in ("LAB", "I;16") else IMAGE.convert(mode)) for mode in MODES
        )
    },
}
