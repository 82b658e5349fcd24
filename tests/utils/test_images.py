"""read_image: orientation, color modes, source types, and one clear line for unreadable images."""

import functools
import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from deformable_detr.utils.errors import UserError
from deformable_detr.utils.images import decode_image, read_image, read_size
from deformable_detr.utils.png import MAX_TEXT, without_texts

WHITE, RED = (255, 255, 255), (200, 30, 40)


def random_pixels(width=6, height=4):
    """Return random pixels, so that orientations are distinguishable."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# The transform that undoes each orientation of the EXIF standard.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_exif_orientation(tmp_path, orientation, suffix):
    stored = random_pixels()
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(stored).save(path, exif=exif)
    expected = UPRIGHT[orientation](stored).transpose(2, 0, 1)
    image = read_image(path)
    assert image.shape == ((3, 6, 4) if orientation > 4 else (3, 4, 6))
    np.testing.assert_array_equal(image.numpy(), expected)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(read_image(opened).numpy(), expected)


def pixel(image):
    return tuple(read_image(image)[:, 0, 0].tolist())


def test_color_modes():
    rgb = Image.new("RGB", (2, 2), RED)
    assert pixel(rgb) == RED
    assert pixel(rgb.convert("CMYK")) == RED
    assert np.abs(np.subtract(pixel(rgb.convert("YCbCr")), RED)).max() <= 2
    assert pixel(Image.new("L", (2, 2), 77)) == (77, 77, 77)
    assert pixel(Image.new("1", (2, 2), 1)) == WHITE
    assert pixel(rgb.quantize(4)) == RED


def test_transparency_is_composited_over_white(tmp_path):
    assert pixel(Image.new("RGBA", (2, 2), (*RED, 255))) == RED
    assert pixel(Image.new("RGBA", (2, 2), (*RED, 0))) == WHITE
    assert pixel(Image.new("LA", (2, 2), (40, 0))) == WHITE
    assert pixel(Image.new("LA", (2, 2), (40, 255))) == (40, 40, 40)
    half = pixel(Image.new("RGBA", (2, 2), (0, 0, 0, 128)))
    assert half == (127, 127, 127)

    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    image = read_image(tmp_path / "p.png")
    assert image[:, 0, 0].tolist() == list(WHITE)
    assert image[:, 0, 1].tolist() == [10, 20, 30]

    Image.new("RGB", (2, 2), RED).save(tmp_path / "rgb.png", transparency=RED)
    assert pixel(tmp_path / "rgb.png") == WHITE


def test_16_bit_images_are_scaled(tmp_path):
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    for source in (tmp_path / "deep.png", values, Image.fromarray(values), Image.fromarray(values.astype(np.int32))):
        assert read_image(source)[0].tolist() == [[0, 1, 100, 255]]
    big_endian = Image.frombytes("I;16B", (4, 1), values.astype(">u2").tobytes())
    assert read_image(big_endian)[2].tolist() == [[0, 1, 100, 255]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([float("nan"), 0.0, 1.0], [0, 0, 255]),
        ([7e5, 7e5, 7e5], [0, 0, 0]),
    ],
)
def test_float_images_are_scaled(values, expected):
    assert read_image(Image.fromarray(np.array([values], dtype=np.float32)))[1].tolist() == [expected]


def test_integers_beyond_16_bits_are_scaled():
    assert read_image(Image.fromarray(np.array([[-10, 0, 10]], dtype=np.int32)))[0].tolist() == [[0, 128, 255]]


def test_arrays_and_tensors():
    array = random_pixels()
    expected = torch.from_numpy(array).permute(2, 0, 1)
    assert torch.equal(read_image(array), expected)
    assert torch.equal(read_image(array[:, ::-1]), expected.flip(2))
    assert torch.equal(read_image(np.dstack([array, np.full((4, 6), 255, np.uint8)])), expected)
    assert torch.equal(read_image(array[..., 0]), expected[:1].expand(3, -1, -1))
    assert torch.equal(read_image(array[..., :1]), expected[:1].expand(3, -1, -1))
    assert torch.equal(read_image(expected[:1]), expected[:1].expand(3, -1, -1))
    for dtype in ("<u2", ">u2"):
        assert torch.equal(read_image((array[..., 0] * np.uint16(257)).astype(dtype)), expected[:1].expand(3, -1, -1))
    tensor = read_image(expected)
    assert torch.equal(tensor, expected)
    assert tensor.is_contiguous()
    tensor.zero_()
    assert expected.any(), "the result must not share the source's memory"


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((3, 40, 50), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4,), np.uint8),
        torch.zeros(3, 4, 4),
        torch.zeros(4, 4, 3, dtype=torch.uint8),
        torch.zeros(3, 0, 4, dtype=torch.uint8),
        7,
    ],
)
def test_invalid_sources_are_rejected(source):
    with pytest.raises(UserError, match=r"^an image (array|tensor)? ?must be"):
        read_image(source)


def test_file_objects_are_refused_with_a_hint():
    with pytest.raises(UserError, match=r"not BytesIO; open it with PIL\.Image\.open"):
        read_image(io.BytesIO())


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "bmp"])
def test_closed_pil_images_are_named(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(random_pixels()).save(path)
    with Image.open(path) as left, Image.open(path) as loaded:
        loaded.load()
    assert read_image(loaded).shape == (3, 4, 6)
    closed = Image.open(path)
    closed.close()
    for image in (left, closed):
        with pytest.raises(UserError) as caught:
            read_image(image)
        assert str(caught.value) == f"the PIL image {path} is closed; open it again, or pass its path"
    with open(path, "rb") as file:
        left = Image.open(file)
    closed = loaded.copy()
    closed.close()
    for image in (left, closed):
        with pytest.raises(UserError) as caught:
            read_image(image)
        assert str(caught.value) == "the PIL image is closed; open it again"


def jpeg():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [jpeg()[:2000], jpeg()[:100], b"", b"GIF89a", b"<html>", jpeg()[:2] + bytes(500), b"II*\x00" + bytes(20)],
    ids=["truncated", "header only", "empty", "gif head", "html", "zeros", "tiff head"],
)
def test_damaged_files_are_reported(tmp_path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: cannot be read as an image (")
    assert "\n" not in message
    path.write_bytes(jpeg())
    assert read_image(path).shape == (3, 64, 64)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jpg: no such image file"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_image(tmp_path)


def test_too_many_pixels(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (400, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    assert read_image(path).shape == (3, 100, 400)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15_000)
    with pytest.raises(UserError, match=r"bomb\.png: too many pixels"):
        read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 39_999)
    with (
        pytest.raises(UserError, match=r"bomb\.png: 400 × 100 pixels exceed the limit"),
        pytest.warns(Image.DecompressionBombWarning),
    ):
        read_image(path)


@pytest.mark.parametrize("broken", [b"", b"not exif", b"II*\x00\xff\xff\xff\xff", b"MM\x00*\x00\x00\x00\x08\xff\xff"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_damaged_exif_is_ignored(tmp_path, suffix, broken):
    path = tmp_path / f"photo.{suffix}"
    image = Image.fromarray(random_pixels(64, 48))
    image.save(path)
    expected = read_image(path)
    image.save(path, exif=b"Exif\x00\x00" + broken)
    assert read_size(path) == (48, 64)
    assert torch.equal(read_image(path), expected)


def png_with(pixels, chunk, after):
    """Return a PNG with one more chunk, before or after the pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    content, (kind, body) = file.getvalue(), chunk
    start = content.index(b"IEND" if after else b"IDAT") - 4
    added = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return content[:start] + added + content[start:]


def mark(orientation, padding=0):
    """Return EXIF and XMP with an orientation; `padding` bytes of XMP come first."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    xmp = f'<x:xmpmeta>{" " * padding}<rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    return exif.tobytes()[6:], xmp


def png_chunk(kind, orientation, padding=0):
    exif, xmp = mark(orientation, padding)
    profile = b"\nexif\n%8d\n" % (len(exif) + 6) + (b"Exif\0\0" + exif).hex().encode() + b"\n"
    head = b"XML:com.adobe.xmp\0"
    return {
        "eXIf": (b"eXIf", exif),
        "profile": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
        "profile, plain": (b"tEXt", b"Raw profile type exif\0" + profile),
        "XMP": (b"iTXt", head + b"\0\0\0\0" + xmp),
        "XMP, compressed": (b"iTXt", head + b"\1\0en\0t\0" + zlib.compress(xmp)),
    }[kind]


MARKS = ["eXIf", "profile", "profile, plain", "XMP", "XMP, compressed"]
PLACES = [("PNG", kind, after) for kind in MARKS for after in (False, True)]
PLACES += [(suffix, kind, False) for suffix in ("JPEG", "WEBP", "TIFF", "TIFF, LZW") for kind in ("EXIF", "XMP")]


def marked_image(place, orientation, pixels):
    """Return the bytes of an image with an orientation mark."""
    suffix, kind, after = place
    if suffix == "PNG":
        return png_with(pixels, png_chunk(kind, orientation), after)
    exif, xmp = mark(orientation)
    file, options = io.BytesIO(), {"quality": 95}
    if suffix.startswith("TIFF"):
        options = {"compression": "tiff_lzw"} if "LZW" in suffix else {}
        options["tiffinfo"] = {274: orientation} if kind == "EXIF" else {700: xmp}
    else:
        options |= {"exif": b"Exif\0\0" + exif} if kind == "EXIF" else {"xmp": xmp}
    Image.fromarray(pixels).save(file, suffix.partition(",")[0], **options)
    return file.getvalue()


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(PLACES), st.sampled_from([*range(10)]), st.integers(8, 40), st.integers(8, 40))
def test_size_and_pixels_follow_the_same_orientation(tmp_path_factory, place, orientation, width, height):
    assume(place[:2] != ("TIFF, LZW", "EXIF") or orientation in UPRIGHT)  # libtiff writes no others
    stored = np.full((height, width, 3), 255, np.uint8)
    stored[: height // 2, : width // 2] = (0, 0, 255)  # the mark: top left as stored
    path = tmp_path_factory.getbasetemp() / "marked"
    path.write_bytes(marked_image(place, orientation, stored))
    expected = UPRIGHT.get(orientation, UPRIGHT[1])(stored).transpose(2, 0, 1)
    image = read_image(path)
    assert read_size(path) == tuple(image.shape[1:]) == expected.shape[1:]
    assert np.abs(image.numpy().astype(int) - expected).mean() < (1 if place[0] in ("PNG", "TIFF", "TIFF, LZW") else 30)
    assert torch.equal(decode_image(path.read_bytes(), "bytes"), image)
    with Image.open(path) as opened:
        assert torch.equal(read_image(opened), image)


def test_an_orientation_that_is_no_number_counts_as_1(tmp_path):
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<rdf:Description tiff:Orientation="x"/>'
    (tmp_path / "a.png").write_bytes(png_with(random_pixels(), (b"iTXt", xmp), False))
    assert read_size(tmp_path / "a.png") == (4, 6) == tuple(read_image(tmp_path / "a.png").shape[1:])


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", ["XMP", "XMP, compressed"])
def test_large_texts_of_png_are_left_out(tmp_path, kind, after):
    path = tmp_path / "a.png"
    path.write_bytes(png_with(random_pixels(), png_chunk(kind, 6, padding=3_000_000), after))
    assert read_size(path) == (6, 4)
    np.testing.assert_array_equal(read_image(path).numpy(), UPRIGHT[6](random_pixels()).transpose(2, 0, 1))


def test_a_decompression_bomb_in_a_text_is_harmless(tmp_path):
    bomb = zlib.compress(bytes(200_000_000), 9)
    for head in (b"XML:com.adobe.xmp\0\0", b"Comment\0\0"):
        (tmp_path / "a.png").write_bytes(png_with(random_pixels(), (b"zTXt", head + bomb), False))
        _, info = without_texts(io.BytesIO((tmp_path / "a.png").read_bytes()), pixels=True)
        assert len(info.get("xmp", b"")) <= MAX_TEXT
        assert read_image(tmp_path / "a.png").shape == (3, 4, 6)


_COLUMNS, _ROWS = np.meshgrid(np.arange(0, 250, 5), np.arange(0, 240, 6))
PICTURE = np.stack([_COLUMNS, _ROWS, np.full((40, 50), 90)], -1).astype(np.uint8)
GRAY = PICTURE[..., 0]
TIFFS = {  # name: pixels, options of tifffile, whether it is gray
    "rgb16 planar": ((PICTURE.astype(np.uint16) * 257).transpose(2, 0, 1), {"planarconfig": "separate"}),
    "rgb8 planar": (PICTURE.transpose(2, 0, 1), {"planarconfig": "separate"}),
    "rgb16": (PICTURE.astype(np.uint16) * 257, {}),
    "rgb16 big-endian LZW": (PICTURE.astype(np.uint16) * 257, {"byteorder": ">", "compression": "lzw"}),
    "rgb float32": (PICTURE / np.float32(255), {}),
    "rgb float32 planar": ((PICTURE / np.float32(255)).transpose(2, 0, 1), {"planarconfig": "separate"}),
    "rgb float64": (PICTURE.astype(np.float64), {}),
    "rgb16 zstd": (PICTURE.astype(np.uint16) * 257, {"compression": "zstd"}),
    "bands": (np.dstack([PICTURE, PICTURE, GRAY]), {"photometric": "minisblack", "planarconfig": "contig"}),
    "7 planes": (np.dstack([PICTURE, PICTURE, GRAY]).transpose(2, 0, 1),
                 {"photometric": "minisblack", "planarconfig": "separate"}),
    "4 bands of 16 bits": (np.dstack([PICTURE, GRAY]).astype(np.uint16) * 257,
                           {"photometric": "minisblack", "planarconfig": "contig"}),
    "tiled": (PICTURE, {"tile": (16, 16)}),
    "tiled rgb16 deflate": (PICTURE.astype(np.uint16) * 257, {"tile": (16, 16), "compression": "zlib"}),
    "JPEG in YCbCr": (PICTURE, {"compression": "jpeg"}),
    "BigTIFF": (PICTURE, {"bigtiff": True}),
    "BigTIFF float": (PICTURE / np.float32(255), {"bigtiff": True}),
    "gray uint32": (GRAY.astype(np.uint32) * 16843009, {}),
    "gray uint32 big-endian": (GRAY.astype(np.uint32) * 16843009, {"byteorder": ">"}),
    "gray float16": ((GRAY / 255).astype(np.float16), {}),
    "gray float32": (GRAY / np.float32(255), {}),
    "gray uint16": (GRAY.astype(np.uint16) * 257, {}),
    "inverted uint16": (65535 - GRAY.astype(np.uint16) * 257, {"photometric": "miniswhite"}),
    "BigTIFF big-endian": (PICTURE, {"bigtiff": True, "byteorder": ">"}),
    "gray int16": ((GRAY.astype(int) * 32767 // 255).astype(np.int16), {}),
    "gray int8": ((GRAY // 2).astype(np.int8), {}),
    "gray planes with opacity": (np.stack([GRAY, np.full_like(GRAY, 255)]),
                                 {"photometric": "minisblack", "planarconfig": "separate", "extrasamples": (2,)}),
    "gray16 with opacity": (np.dstack([GRAY.astype(np.uint16) * 257, np.full_like(GRAY, 65535, np.uint16)]),
                            {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": (2,)}),
    "inverted uint8": (255 - GRAY, {"photometric": "miniswhite"}),
}  # fmt: skip


@functools.cache
def tiff_bytes(name):
    tifffile = pytest.importorskip("tifffile")
    pixels, options = TIFFS[name]
    file = io.BytesIO()
    keys = ("bigtiff", "byteorder")
    with tifffile.TiffWriter(file, **{key: options[key] for key in keys if key in options}) as writer:
        rest = {key: value for key, value in options.items() if key not in keys}
        color = "minisblack" if pixels.ndim == 2 else "rgb"
        writer.write(pixels, **({"photometric": color, "metadata": None} | rest))
    return file.getvalue()


def assert_is_picture(image, name, tolerance=2):
    gray = "gray" in name or "inverted" in name
    expected = np.repeat(GRAY[..., None], 3, 2) if gray else PICTURE
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("name", TIFFS)
def test_tiff_layouts_show_the_same_picture(tmp_path, name):
    path = tmp_path / "a.tif"
    path.write_bytes(tiff_bytes(name))
    tolerance = 12 if "JPEG" in name else 2
    assert_is_picture(read_image(path), name, tolerance)
    assert read_size(path) == (40, 50)
    assert_is_picture(decode_image(path.read_bytes(), "bytes"), name, tolerance)


@pytest.mark.parametrize("name", ["rgb16 planar", "rgb float32", "gray float16", "bands", "gray uint32 big-endian"])
def test_without_tifffile_one_line_says_what_to_install(tmp_path, monkeypatch, name):
    path = tmp_path / "a.tif"
    path.write_bytes(tiff_bytes(name))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    lines = set()
    for read in (read_image, read_size):
        with pytest.raises(UserError, match=r"TIFF of \d × \d+-bit .*pip install 'deformable-detr\[tiff\]'") as caught:
            read(path)
        lines.add(str(caught.value))
    assert len(lines) == 1


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("mode", ["CMYK", "P", "1", "LA", "RGBA"])
def test_tiffs_of_other_modes(tmp_path, monkeypatch, mode, compression):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    picture = np.where(PICTURE < 128, np.uint8(0), np.uint8(255)) if mode == "1" else PICTURE
    image = Image.fromarray(picture).quantize(64, kmeans=8) if mode == "P" else Image.fromarray(picture).convert(mode)
    image.save(tmp_path / "a.tif", compression=compression)
    assert read_size(tmp_path / "a.tif") == (40, 50)
    assert torch.equal(read_image(tmp_path / "a.tif"), read_image(image))
    assert (read_image(image).permute(1, 2, 0).int() - torch.from_numpy(picture)).abs().float().mean() < (
        6 if mode in ("CMYK", "P", "RGBA") else 128
    )


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_tiff_of_12_bits(tmp_path, byteorder):
    """Two values share three bytes, the high bits first in either byte order."""
    values = GRAY.astype(int) * 4095 // 255
    first, second = values[:, ::2], values[:, 1::2]
    pixels = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()
    entries = [(256, 4, 50), (257, 4, 40), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 134), (277, 3, 1),
               (278, 4, 40), (279, 4, len(pixels))]  # fmt: skip
    packed = [
        struct.pack(byteorder + ("HHIHxx" if kind == 3 else "HHII"), tag, kind, 1, value)
        for tag, kind, value in entries
    ]
    head = struct.pack(byteorder + "2sHIH", b"II" if byteorder == "<" else b"MM", 42, 8, len(entries))
    (tmp_path / "a.tif").write_bytes((head + b"".join(packed) + bytes(4)).ljust(134, b"\0") + pixels)
    if byteorder == ">":
        pytest.importorskip("tifffile")
        pytest.importorskip("imagecodecs")
    assert read_size(tmp_path / "a.tif") == (40, 50)
    assert_is_picture(read_image(tmp_path / "a.tif"), "gray")


def test_loaded_pil_images_of_tiffs(tmp_path):
    """Pillow keeps no file of an image that it has loaded."""
    for name in ("rgb16 planar", "gray uint32", "rgb16"):
        (tmp_path / "a.tif").write_bytes(tiff_bytes(name))
        image = Image.open(tmp_path / "a.tif")
        image.load()
        if name == "rgb16 planar":
            with pytest.raises(UserError, match=r"a\.tif: Pillow misreads a TIFF of .* in planes\); pass the path"):
                read_image(image)
        else:
            assert_is_picture(read_image(image), name)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(TIFFS)), st.floats(0, 1), st.integers(0, 255))
def test_cut_off_tiffs_raise_one_line(name, fraction, damage):
    content = bytearray(tiff_bytes(name))
    content = content[: int(len(content) * fraction)]
    if damage % 2 and content:
        content[damage % len(content)] ^= damage
    try:
        result = decode_image(bytes(content), "a.tif")
    except UserError as error:
        result = str(error)
    assert "\n" not in result if isinstance(result, str) else result.shape[0] == 3


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("missing", [-9999.0, -3.4028234663852886e38, float("nan")])
def test_missing_values_are_black_and_do_not_count_as_brightness(tmp_path, declared, missing):
    tifffile = pytest.importorskip("tifffile")
    values = GRAY.astype(np.float32) * 8
    values[:20, :20] = missing
    tags = [(42113, "s", 0, str(missing), True)] if declared else []
    tifffile.imwrite(tmp_path / "a.tif", values, extratags=tags, metadata=None)
    image = read_image(tmp_path / "a.tif")[0].numpy().astype(int)
    assert not image[:20, :20].any()
    assert np.abs(image - GRAY)[20:].max() <= 10


def test_transparent_gray_is_white(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pixels = np.dstack([GRAY.astype(np.uint16) * 257, np.where(GRAY < 100, 0, 65535).astype(np.uint16)])
    options = {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": (2,), "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[1].numpy(), np.where(GRAY < 100, 255, GRAY))
    values = GRAY.astype(np.uint16) * 257
    Image.fromarray(values).save(tmp_path / "a.png", transparency=int(values[0, 9]))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[1].numpy(), np.where(GRAY[0, 9] == GRAY, 255, GRAY))


def test_a_palette_written_for_8_bits(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    colors = np.random.default_rng(0).integers(0, 256, (3, 256), dtype=np.uint16)
    for factor in (1, 257):
        tifffile.imwrite(tmp_path / "a.tif", GRAY, photometric="palette", colormap=colors * factor, metadata=None)
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif").numpy(), colors[:, GRAY])


@pytest.mark.parametrize("tags", [{"extratags": [(50706, "B", 4, (1, 4, 0, 0), True)]}, {"subifds": 1}, {}])
def test_thumbnails_of_camera_raw_are_refused(tmp_path, tags):
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(PICTURE[::4, ::4], photometric="rgb", subfiletype=1, metadata=None, **tags)
        writer.write(GRAY.astype(np.uint16), photometric="cfa", metadata=None)
    for read in (read_image, read_size, lambda path: read_image(Image.open(path))):
        with pytest.raises(UserError, match=r"a\.tif: a TIFF .*camera raw, or a thumbnail.* is not supported; convert"):
            read(tmp_path / "a.tif")


def test_of_several_pages_the_first_is_read(tmp_path):
    pages = [Image.fromarray(PICTURE), Image.new("RGB", (10, 10))]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert_is_picture(read_image(tmp_path / "a.tif"), "rgb")
    assert read_size(tmp_path / "a.tif") == (40, 50)


CONTENT = {
    "HEIC image": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "a camera raw image": b"\0\0\0\x18ftypcrx \0\0\0\1crx isom",
    "a camera raw image of Canon": b"II*\0\x10\0\0\0CR\2\0",
    "a video": b"\0\0\0\x18ftypisom\0\0\2\0isomavc1",
    "a PDF": b"%PDF-1.7\n",
    "an HTML page": b"\n<!DOCTYPE html><html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
    "an SVG drawing": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
}


@pytest.mark.parametrize("content", CONTENT)
def test_other_content_in_a_jpg_is_named(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(CONTENT[content] + bytes(600))
    for read in (read_image, read_size):
        with pytest.raises(
            UserError, match=rf"a\.jpg: cannot be read as an image \(it is .*{content[2:].removesuffix(' of Canon')}"
        ):
            read(tmp_path / "a.jpg")


def test_a_cut_off_avif_is_no_video(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.avif")
    (tmp_path / "a.avif").write_bytes((tmp_path / "a.avif").read_bytes()[:200])
    with pytest.raises(UserError, match=r"a\.avif: cannot be read as an image \((?!it is)"):
        read_image(tmp_path / "a.avif")


CASES = Path(__file__).parents[3] / "shared" / "cases"


@pytest.mark.skipif(not CASES.is_dir(), reason="needs the shared cases")
def test_shared_cases():
    folder = CASES / "31-tiff-kinds"
    expected = read_image(folder / "rgb8.tif").int()
    for name in ("rgb16_planar", "rgb_float32", "grey_uint32", "grey_float16"):
        image = read_image(folder / f"{name}.tif").int()
        assert (image - (expected if "rgb" in name else expected[:1])).abs().max() <= 2
    for path in (
        path for case in ("27-png-xmp-orientation", "32-png-large-text") for path in (CASES / case).rglob("*.png")
    ):
        assert read_size(path) == tuple(read_image(path).shape[1:])
