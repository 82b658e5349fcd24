"""Any picture to one form: a uint8 RGB tensor, upright."""

from __future__ import annotations

import io
import os
import stat
import struct
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import UserError

_ORIENTATION = 0x0112  # the EXIF tag
TURNED = (5, 6, 7, 8)  # its values that exchange width and height

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor


def read_image(source: ImageSource) -> Tensor:
    """The picture as uint8 RGB, (3, H, W), on the CPU and independent of the source's memory.

    source: a path, a PIL image, a uint8 array (H, W, 3) (also (H, W), (H, W, 1) gray, (H, W, 4) RGBA, and uint16
    (H, W)), or a uint8 tensor (3, H, W) (also (1, H, W) gray). The first frame of a film or a multi-page file.

    - EXIF orientation is applied: height and width are those of the upright picture.
    - Transparency is laid over white, as on a page.
    - 16-bit gray is divided by 257, so 65535 becomes 255; nothing saturates. 32-bit whole numbers (mode I) are taken
      as 16-bit where they fit. Real numbers (mode F) are taken as 0..1 where they fit, else as 0..255. What fits
      neither is stretched from its own minimum and maximum; NaN becomes 0.
    - Pictures above Pillow's limit (`PIL.Image.MAX_IMAGE_PIXELS`, 89 megapixels) are refused before they are decoded.

    Raises `UserError`, naming the file, for anything that is no whole picture.
    """
    if isinstance(source, Tensor):
        return _from_tensor(source)
    if isinstance(source, np.ndarray):
        return _to_tensor(_rgb(_from_array(source)))
    if isinstance(source, Image.Image):
        return _decode(source, getattr(source, "filename", "") or "the PIL image")
    if not isinstance(source, str | os.PathLike):
        raise UserError(f"an image must be a path, PIL image, array or tensor, not {type(source).__name__}")
    name = os.fspath(source)
    _refuse_no_file(name)
    try:
        image = Image.open(name)
    except Exception as error:  # decoders raise whatever they like on broken bytes
        raise _unreadable(name, error) from error
    with image:
        return _decode(image, name)


def decode_image(data: bytes, name: str) -> Tensor:
    """`read_image` of a file's bytes; `name` is what errors call them."""
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:  # its message has an address in memory, another one each time
        raise _unreadable(name, ValueError("of no known image format" if data else "no bytes")) from None
    except Exception as error:  # decoders raise whatever they like on broken bytes
        raise _unreadable(name, error) from error
    with image:
        return _decode(image, name)


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) of the upright picture, from the file's header alone; `UserError` as `read_image` raises it."""
    return read_header(path)[0]


def read_header(path: str | os.PathLike[str]) -> tuple[tuple[int, int], int]:
    """`read_size`, and the EXIF orientation: 1 upright; 5 to 8 turn the stored picture by a quarter."""
    name = os.fspath(path)
    _refuse_no_file(name)
    try:
        with Image.open(name) as image:
            _refuse_program(image)
            width, height = image.size
            orientation = _orientation(image) if _may_have_exif(image, name) else 1
    except Exception as error:  # decoders raise whatever they like on broken bytes
        raise _unreadable(name, error) from error
    _refuse_size(name, width, height)
    return ((width, height) if orientation in TURNED else (height, width)), orientation


def _refuse_no_file(name: str) -> None:
    """Folders, and pipes, at which reading would wait for ever."""
    try:
        mode = os.stat(name).st_mode
    except (OSError, ValueError):
        raise UserError(f"{name}: no such image file; put it there or leave it out") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{name}: cannot be read as an image (it is no file); put the image there")


def _may_have_exif(image: Image.Image, name: str) -> bool:
    """False for a PNG without EXIF, which Pillow would decode as a whole to be sure."""
    if image.format != "PNG" or image.info.keys() & {"exif", "Raw profile type exif"}:
        return True
    with open(name, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:  # length and type of a chunk; four bytes of checksum end it
            if head[4:] == b"eXIf":
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    return False


def _orientation(image: Image.Image) -> int:
    """1 too where the EXIF is broken: the pixels need not be."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return 1


def _refuse_size(name: str, width: int, height: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise UserError(
            f"{name}: {width} × {height} pixels are above the limit of {limit / 1e6:.0f} megapixels; "
            "cut it into tiles or make it smaller first"
        )
    if not width or not height:
        raise UserError(f"{name}: an image without pixels ({width} × {height}); replace or remove it")


def _refuse_program(image: Image.Image) -> None:
    """PostScript is a program, which Pillow would hand to Ghostscript."""
    if image.format in ("EPS", "WMF"):
        raise ValueError(f"{image.format} is not read, it is a drawing")


def _decode(image: Image.Image, name: str) -> Tensor:
    _refuse_size(name, *image.size)
    try:
        _refuse_program(image)
        image.load()
        return _to_tensor(_rgb(ImageOps.exif_transpose(image) if _orientation(image) != 1 else image))
    except Exception as error:  # truncated data and broken headers come as many kinds of error
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> UserError:
    if isinstance(error, Image.DecompressionBombError):
        return UserError(f"{name}: too many pixels to be safe ({error}); cut it into tiles or make it smaller first")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    reason = " ".join(reason.split())
    return UserError(f"{name}: cannot be read as an image ({reason}); replace or remove it")


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return _gray(np.asarray(image).astype(np.float64) / 257)
    if image.mode == "I":
        values = np.asarray(image).astype(np.float64)
        fits = values.min() >= 0 and values.max() <= 65535
        return _gray(values / 257 if fits else _stretched(values))
    if image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        values = np.where(np.isfinite(values), values, 0.0)
        if values.min() >= 0 and values.max() <= 255:
            return _gray(values * 255 if values.max() <= 1 else values)
        return _gray(_stretched(values))
    if image.has_transparency_data:
        color = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", color.size, "white"), color).convert("RGB")
    return image.convert("RGB")


def _gray(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")


def _stretched(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)


def _from_array(array: np.ndarray) -> Image.Image:
    pixels = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    color = pixels.ndim == 3 and pixels.shape[2] in (3, 4) and pixels.dtype == np.uint8
    gray = pixels.ndim == 2 and pixels.dtype in (np.uint8, np.uint16)
    if not (color or gray) or 0 in pixels.shape:
        raise UserError(f"an image array must be uint8 of shape (H, W, 3), not {_describe(array)}")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _from_tensor(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.uint8 or tensor.ndim != 3 or tensor.shape[0] not in (1, 3) or not tensor.numel():
        raise UserError(f"an image tensor must be uint8 of shape (3, H, W), not {_describe(tensor)}")
    return tensor.detach().cpu().expand(3, -1, -1).clone(memory_format=torch.contiguous_format)


def _describe(values: Any) -> str:
    return f"{str(values.dtype).removeprefix('torch.')} of shape {tuple(values.shape)}"


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
