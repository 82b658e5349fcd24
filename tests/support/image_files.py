"""Valid and damaged image files and the issues that each leads to."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from tests.support.datasets import SIZE

PIXELS = np.random.default_rng(5).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)


def encode(kind, image=IMAGE, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_with_size(width, height):
    """Return a PNG whose header claims this size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def png_16bit(highest):
    """Return a 16-bit PNG."""
    values = np.linspace(0, highest, SIZE[0] * SIZE[1]).reshape(SIZE[::-1])
    return encode("PNG", Image.fromarray(values.astype(np.uint16)))


def rgb_png_16bit(highest):
    """Return a PNG with 16 bits per channel, which Pillow cannot write."""
    width, height = SIZE
    values = np.linspace(0, highest, width * height * 3).astype(">u2").reshape(height, -1)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in values))
    return PNG[:8] + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found


PNG, JPEG = encode("PNG"), encode("JPEG", quality=95)
ROTATED_JPEG = encode("JPEG", IMAGE.transpose(Image.Transpose.ROTATE_90), exif=exif(6))
UNROTATED_JPEG = encode("JPEG", exif=exif(6))
MODES = ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F")
BROKEN = {"image-unreadable"}

# content of train/a.png → expected issue codes
FILES = {
    "empty": (b"", BROKEN),
    "text": (b"not an image\n", BROKEN),
    "HTML page": (b"<!doctype html><html><body>404</body></html>", BROKEN),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n", BROKEN),
    "ZIP file": (b"PK\x03\x04" + bytes(200), BROKEN),
    "NumPy file": (b"\x93NUMPY\x01\x00" + bytes(200), BROKEN),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20"/>', BROKEN),
    "PDF": (b"%PDF-1.4\n%%EOF\n", BROKEN),
    "zeros": (bytes(5000), BROKEN),
    "PNG: signature only": (PNG[:8], BROKEN),
    "PNG: header only": (PNG[:33], BROKEN),
    "PNG: half": (PNG[: len(PNG) // 2], BROKEN),
    "PNG: last tenth missing": (PNG[: len(PNG) * 9 // 10], BROKEN),
    "PNG: wrong header checksum": (PNG[:29] + b"\0\0\0\0" + PNG[33:], BROKEN),
    "PNG: bytes changed inside": (PNG[:200] + bytes(50) + PNG[250:], BROKEN),
    "PNG: zero width": (png_with_size(0, 20), BROKEN),
    "PNG: missing rows": (png_with_size(40, 20), BROKEN),
    "PNG: above the pixel limit": (png_with_size(10_000, 9_000), BROKEN),
    "PNG: decompression bomb": (png_with_size(60_000, 60_000), BROKEN),
    "PNG: absurd size": (png_with_size(2**31 - 1, 2**31 - 1), BROKEN),
    "JPEG: start only": (JPEG[:4], BROKEN),
    "JPEG: headers only": (JPEG[:300], BROKEN),
    "JPEG: half": (JPEG[: len(JPEG) // 2], BROKEN),
    "GIF: half": (encode("GIF")[:100], BROKEN),
    "BMP: half": (encode("BMP")[:1000], BROKEN),
    "TIFF: half": (encode("TIFF")[:1000], BROKEN),
    "WebP: half": (encode("WEBP")[:200], BROKEN),
    "size differs from the record": (encode("PNG", IMAGE.resize((80, 40))), {"image-size"}),
    "one pixel": (encode("PNG", IMAGE.resize((1, 1))), {"image-size", "box-outside"}),
    "recorded size before EXIF rotation": (UNROTATED_JPEG, {"image-rotated", "box-outside"}),
    "recorded size after EXIF rotation": (ROTATED_JPEG, set()),
    "EXIF upside down": (encode("JPEG", exif=exif(3)), set()),
    "EXIF orientation out of range": (encode("JPEG", exif=exif(99)), set()),
    "malformed EXIF": (encode("JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), set()),
    "PNG with trailing bytes": (PNG + b"more" * 100, set()),
    "JPEG with trailing bytes": (JPEG + b"more" * 100, set()),
    "JPEG named .png": (JPEG, set()),
    "animated GIF": (encode("GIF", save_all=True, append_images=[IMAGE.rotate(90)]), set()),
    "multi-page TIFF": (encode("TIFF", save_all=True, append_images=[IMAGE]), set()),
    "BMP": (encode("BMP"), set()),
    "WebP": (encode("WEBP"), set()),
    "progressive JPEG": (encode("JPEG", progressive=True), set()),
    "PNG with a transparent color": (encode("PNG", transparency=(1, 2, 3)), set()),
    "16 bits": (png_16bit(65535), set()),
    "13 bits": (png_16bit(8191), set()),
    "12 bits of 16": (png_16bit(4095), {"image-dim"}),
    "12 bits of 16, very dark": (png_16bit(100), {"image-dim"}),
    "12 bits of 16, RGB": (rgb_png_16bit(4095), {"image-dim"}),
    "16 bits, RGB": (rgb_png_16bit(65535), set()),
    "8 bits, almost black": (encode("PNG", IMAGE.point(lambda value: value // 32)), set()),
    **{
        f"mode {mode}": (
            encode("TIFF" if mode in ("LAB", "CMYK", "F", "YCbCr", "I") else "PNG", image),
            {"image-dim"} if mode == "I;16" else set(),  # black
        )
        for mode, image in (
            (mode, Image.new(mode, SIZE) if mode in ("LAB", "I;16") else IMAGE.convert(mode)) for mode in MODES
        )
    },
}
