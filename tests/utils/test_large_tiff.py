"""TIFF files larger than memory: windows equal those of the whole image, and damage is one line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr.utils import large_tiff
from deformable_detr.utils.errors import UserError
from deformable_detr.utils.images import read_image
from deformable_detr.utils.large_tiff import LargeTiff, open_image
from deformable_detr.utils.tiles import Window, tile_grid

tifffile = pytest.importorskip("tifffile", reason="needs tifffile")

RANDOM = np.random.default_rng(0)
SMOOTH = np.add.outer(np.arange(130), np.arange(210))[..., None] % 256
RGB = (SMOOTH + RANDOM.integers(0, 40, (130, 210, 3))).clip(0, 255).astype(np.uint8)
GRAY16 = RANDOM.integers(0, 65536, (130, 210)).astype(np.uint16)
RGBA = np.concatenate([RGB, RGB[..., :1]], axis=2)
TILED = {"tile": (32, 48)}
CASES = {
    "tiled": (RGB, TILED),
    "tiled-lzw": (RGB, TILED | {"compression": "lzw", "predictor": True}),
    "tiled-deflate-big-endian": (RGB, TILED | {"compression": "zlib"}, {"byteorder": ">"}),
    "tiled-jpeg": (RGB, {"tile": (32, 48), "compression": "jpeg"}),
    "bigtiff-zstd": (RGB, TILED | {"compression": "zstd"}, {"bigtiff": True}),
    "one-strip": (RGB, {}),
    "one-strip-16-bit-big-endian": (GRAY16, {}, {"byteorder": ">"}),
    "strips": (RGB, {"rowsperstrip": 7}),
    "strips-packbits": (RGB, {"rowsperstrip": 7, "compression": "packbits"}),
    "planes": (np.moveaxis(RGB, 2, 0), {"planarconfig": "separate"}),
    "tiled-planes": (np.moveaxis(RGB, 2, 0), TILED | {"planarconfig": "separate"}),
    "gray": (RGB[..., 0], TILED),
    "inverted": (RGB[..., 0], TILED | {"photometric": "miniswhite"}),
    "16-bit": (GRAY16, TILED),
    "alpha": (RGBA, TILED | {"extrasamples": ["unassalpha"]}),
}


def write(path, array, options, file_options=None):
    color = "rgb" if array.ndim == 3 else "minisblack"
    with tifffile.TiffWriter(path, **(file_options or {})) as writer:
        writer.write(array, **{"photometric": color, "metadata": None, **options})
    return path


@pytest.fixture
def low_limit(monkeypatch):
    """Every image counts as larger than memory."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)


@pytest.mark.parametrize("name", CASES)
def test_windows_equal_the_whole_image(tmp_path, name, monkeypatch):
    path = write(tmp_path / "a.tif", *CASES[name])
    expected = read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(large_tiff, "CACHE_BYTES", 20_000)
    monkeypatch.setattr(large_tiff, "ROWS", 16)
    image = open_image(path)
    assert isinstance(image, LargeTiff)
    assert image.size == (130, 210)
    for window in [*tile_grid(130, 210, 50), Window(0, 0, 130, 210), Window(129, 209, 1, 1)]:
        top, left, height, width = window
        pixels = image.read(window)
        assert pixels.dtype == torch.uint8
        difference = (pixels.int() - expected[:, top : top + height, left : left + width].int()).abs().max()
        assert difference <= (4 if "jpeg" in name else 0)  # decoders round differently
    image.close()


def test_pyramids_are_read_at_full_size(tmp_path, low_limit):
    path = tmp_path / "pyramid.tif"
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        writer.write(RGB, subifds=1, photometric="rgb", tile=(32, 48), metadata=None)
        writer.write(RGB[::2, ::2], subfiletype=1, photometric="rgb", tile=(32, 48), metadata=None)
    image = open_image(path)
    assert torch.equal(image.read(Window(3, 5, 90, 100)).permute(1, 2, 0), torch.from_numpy(RGB[3:93, 5:105]))
    image.close()


def test_small_and_other_images_are_read_at_once(tmp_path):
    path = write(tmp_path / "a.tif", RGB, TILED)
    assert isinstance(open_image(path), torch.Tensor)
    Image.fromarray(RGB).save(tmp_path / "a.png")
    assert torch.equal(open_image(tmp_path / "a.png"), read_image(tmp_path / "a.png"))


def test_the_limit_is_lifted_for_windows_only(tmp_path, low_limit):
    path = write(tmp_path / "a.tif", RGB, TILED)
    with pytest.raises(UserError, match="210 × 130 pixels exceed the limit"):
        read_image(path)
    Image.fromarray(RGB).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="too many pixels to be safe"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["tiled", "tiled-lzw", "strips-packbits", "one-strip", "bigtiff-zstd"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
def test_cut_off_files_are_one_line(tmp_path, name, share, low_limit, capfd):
    content = write(tmp_path / "whole.tif", *CASES[name]).read_bytes()
    path = tmp_path / "cut.tif"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError) as caught:
        open_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["tiled-lzw", "tiled-deflate-big-endian", "tiled-jpeg", "bigtiff-zstd"])
def test_damaged_tiles_are_one_line(tmp_path, name, low_limit, capfd):
    path = write(tmp_path / "a.tif", *CASES[name])
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[3], tiff.pages[0].databytecounts[3]
    content = bytearray(path.read_bytes())
    content[offset : offset + count] = b"\xff" * count
    path.write_bytes(content)
    image = open_image(path)
    image.read(Window(0, 0, 32, 48))
    with pytest.raises(UserError, match=re.escape(f"{path}: cannot be read as an image (")) as caught:
        image.read(Window(0, 0, 130, 210))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
    image.close()


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (RGB.astype(np.float32), TILED, "is too large to be read at once; convert it to 8-bit RGB"),
        (RGB, TILED | {"extratags": [(274, "H", 1, 6, False)]}, "too large to be rotated (orientation 6)"),
        (RGB, TILED | {"compression": "jpeg2000"}, "too large for its compression; save it as RGB with one of none"),
        (RGB[..., 0], TILED | {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}, "not supported"),
    ],
)
def test_other_layouts_are_refused(tmp_path, array, options, message, low_limit):
    with pytest.raises(UserError, match=re.escape(message)):
        open_image(write(tmp_path / "a.tif", array, options))


def test_pieces_that_are_too_large_are_refused(tmp_path, low_limit, monkeypatch):
    monkeypatch.setattr(large_tiff, "MAX_SEGMENT_BYTES", 50_000)
    with pytest.raises(UserError, match="stored in pieces of 0 MB"):
        open_image(write(tmp_path / "a.tif", RGB, {"compression": "zlib", "rowsperstrip": 130}))
    open_image(write(tmp_path / "b.tif", RGB, {})).close()  # uncompressed: read by rows


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tiles", "strips"])
def test_memory_is_bounded_by_the_tiles(tmp_path, layout):
    """30,000 × 20,000 pixels (1.8 GB when decoded) are predicted in less than 3 GiB, and every object is found."""
    script = Path(__file__).parent.parent / "support" / "large_image.py"
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    path = str(tmp_path / "large.tif")
    subprocess.run([sys.executable, str(script), "write", path, layout], check=True, env=environment)
    run = subprocess.run(
        [sys.executable, str(script), "predict", path], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    peak = int(run.stdout.split()[-1])
    assert peak < 3 * 2**20, f"{peak} KiB"
