"""read_image: orientation, color modes, source types, and one clear line for unreadable images."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr.utils.errors import UserError
from deformable_detr.utils.images import read_image, read_size

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
