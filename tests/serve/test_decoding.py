"""Image decoding: known formats only, size limits from the header, no decompression bombs."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile
from starlette.exceptions import HTTPException

from deformable_detr.serve.decoding import decode, open_image
from deformable_detr.utils.images import read_image
from tests.support.server import encode_image, pixels

KINDS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


def read(data, max_pixels=50_000_000):
    return decode(open_image(data, "it", max_pixels), "it")


def decoding_status(data, max_pixels=50_000_000):
    with pytest.raises(HTTPException) as caught:
        read(data, max_pixels)
    assert caught.value.detail.startswith("it: ")
    assert "\n" not in caught.value.detail
    return caught.value.status_code


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width, height):
    """Return a PNG of a few kilobytes with a huge size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes(1000) * 1000)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def animation(kind):
    frames = [Image.fromarray(pixels(seed=seed)) for seed in range(5)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=40)
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_decodes_like_predict(kind):
    data = encode_image(kind)
    assert np.array_equal(read(data), read_image(Image.open(io.BytesIO(data))))
    assert read(memoryview(data)).shape == (3, 48, 64)


def test_data_after_a_jpeg_is_ignored():
    """A motion photo has a video after the image, which may contain any bytes."""
    data = encode_image("JPEG")
    assert np.array_equal(read(data + b"\xff\xda\x00\x02" * 500), read(data))
    scan = data.index(b"\xff\xda")
    assert decoding_status(data[:scan] + b"\xff\xda\x00\x02" * 500 + data[scan:]) == 422
    assert decoding_status(data[:scan] + b"\xff\xe5\x00\x02" * 20_000 + data[scan:]) == 422, "endless segments"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_animations(kind):
    assert read(animation(kind)).shape == (3, 48, 64)


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "PPM", "TGA", "PDF", "EPS", "AVIF"])
def test_other_formats_are_rejected(kind):
    try:
        data = encode_image(kind)
    except (KeyError, OSError):
        pytest.skip(f"Pillow cannot write {kind}")
    assert decoding_status(data) == 415


@pytest.mark.parametrize(
    "data",
    [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe", b"http://127.0.0.1/", b"/etc/passwd", bytes(64)],
)
def test_other_data_is_rejected(data):
    assert decoding_status(data) == 415


def test_empty_file():
    assert decoding_status(b"") == 422


@pytest.mark.parametrize("kind", KINDS)
def test_pixel_limit(kind):
    data = encode_image(kind)
    assert decoding_status(data, max_pixels=48 * 64 - 1) == 413
    assert read(data, max_pixels=48 * 64).shape == (3, 48, 64)


@pytest.mark.parametrize("lossless", [True, False])
def test_webp_pixel_limit(lossless):
    data = encode_image("WEBP", lossless=lossless)
    assert data[12:16] == (b"VP8L" if lossless else b"VP8 ")
    assert decoding_status(data, max_pixels=48 * 64 - 1) == 413
    assert read(data, max_pixels=48 * 64).shape == (3, 48, 64)


def test_decompression_bombs_are_not_decoded(monkeypatch):
    webp, gif, decoded = bytearray(animation("WEBP")), bytearray(encode_image("GIF")), []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self.size))
    for side in (7072, 20_000, 2**31 - 1):  # 50.01 megapixels and more
        assert decoding_status(png_bomb(side, side)) == 413
    assert webp[12:16] == b"VP8X"
    webp[24:30] = b"\xff\x3f\x00" * 2  # 16384 × 16384
    assert decoding_status(webp) == 413
    gif[6:10] = b"\xff\xff\xff\xff"
    assert decoding_status(gif) == 413
    assert decoded == []
    small = png_bomb(7000, 7000)  # 49 megapixels: below the limit, so decoding starts
    open_image(small, "it", 50_000_000).load()
    assert decoded == [(7000, 7000)]


def test_jpeg_with_many_scans_is_rejected():
    data = encode_image("JPEG", progressive=True)
    assert read(data).shape == (3, 48, 64)
    start = data.index(b"\xff\xda")
    scan = data[start : data.index(b"\xff\xda", start + 2)]
    assert decoding_status(data[:start] + scan * 101 + data[start:]) == 422
    # Decoders skip an unknown marker but not its length.
    hidden = scan + b"\xff\x02" + (len(scan) * 101 + 2).to_bytes(2) + scan * 101
    with pytest.raises(HTTPException, match="over 100 scans"):
        open_image(data[:start] + hidden + data[start:], "it", 50_000_000)


def test_run_length_bmp_is_rejected():
    """Pillow decodes it in Python: a kilobyte can take a minute."""
    size = struct.pack("<IiiHHI", 40, 50_000, 1000, 1, 8, 1)
    head = size + bytes(20) + bytes(1024)
    with pytest.raises(HTTPException, match="run-length encoding"):
        open_image(b"BM" + struct.pack("<IHHI", 14 + len(head) + 2, 0, 0, 14 + len(head)) + head + b"\0\1", "it", 10**8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0.02, 0.3, 0.9])
def test_truncated_image_is_rejected(kind, part):
    data = encode_image(kind, 200, 300)
    truncated = data[: max(16, int(len(data) * part))]
    assert decoding_status(truncated) in (415, 422)
    assert read(data).shape == (3, 200, 300)


def test_text_and_profile_bombs():
    compressed = zlib.compress(bytes(80_000_000), 9)
    for kind, head in ((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0")):
        data = encode_image()
        data = data[:33] + chunk(kind, head + compressed) + data[33:]
        try:
            assert read(data).shape == (3, 48, 64)
        except HTTPException as error:
            assert error.status_code == 422  # noqa: PT017, either is safe


def test_color_profile():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert read(encode_image("JPEG", icc_profile=profile + bytes(60_000))).shape == (3, 48, 64)
