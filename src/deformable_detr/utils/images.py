"""Read images of any format into upright uint8 RGB tensors."""

import io
import os
import stat
import struct

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import UserError

TRANSPOSED_ORIENTATIONS = (5, 6, 7, 8)  # EXIF orientations that swap width and height

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor


def read_image(source: ImageSource) -> Tensor:
    """Read an image as uint8 RGB, (3, H, W), on the CPU; the result shares no memory with the source.

    - EXIF orientation is applied.
    - Transparent pixels are blended with white.
    - 16-bit gray is divided by 257, so 65535 becomes 255.
    - Integers (mode I) in 0..65535 are read as 16-bit. Floats (mode F) in 0..1 or 0..255 are read in that range. Other
      values are stretched from their minimum and maximum to 0..255; NaN becomes 0.

    Args:
        source: A path, a PIL image, a uint8 array (H, W, 3), (H, W, 4) RGBA, (H, W) or (H, W, 1) gray, a uint16 array
            (H, W), or a uint8 tensor (3, H, W) or (1, H, W). Of several frames or pages, the first is read.

    Raises:
        UserError: The source is not a readable image, or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`; large
            images are refused before they are decoded. The message names the file.
    """
    if isinstance(source, Tensor):
        return _from_tensor(source)
    if isinstance(source, np.ndarray):
        return _to_tensor(_to_rgb(_from_array(source)))
    if isinstance(source, Image.Image):
        return _decode(source, getattr(source, "filename", "") or "the PIL image")
    if not isinstance(source, str | os.PathLike):
        raise UserError(f"an image must be a path, PIL image, array or tensor, not {type(source).__name__}")
    name = os.fspath(source)
    _require_file(name)
    return _open(name, name)


def decode_image(data: bytes, name: str) -> Tensor:
    """Decode the bytes of an image file as `read_image` does; errors call it `name`."""
    return _open(io.BytesIO(data), name)


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return (height, width) of the upright image from the file's header. Raises UserError as `read_image` does."""
    return read_header(path)[0]


def read_header(path: str | os.PathLike[str]) -> tuple[tuple[int, int], int]:
    """Return the size as `read_size` does, and the EXIF orientation, 1 to 8."""
    name = os.fspath(path)
    _require_file(name)
    try:
        with Image.open(name) as image:
            _refuse_vector_graphics(image)
            width, height = image.size
            orientation = _orientation(image) if _may_have_exif(image, name) else 1
    except Exception as error:
        raise _unreadable(name, error) from error
    _check_size(name, width, height)
    return ((width, height) if orientation in TRANSPOSED_ORIENTATIONS else (height, width)), orientation


def _require_file(name: str) -> None:
    """Refuse folders, and pipes, which would block the reader."""
    try:
        mode = os.stat(name).st_mode
    except (OSError, ValueError):
        raise UserError(f"{name}: no such image file; add the file or remove its entry") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{name}: cannot be read as an image (not a regular file); replace it or remove its entry")


def _may_have_exif(image: Image.Image, name: str) -> bool:
    """Return False for a PNG without an EXIF chunk, because `getexif` would decode all of it."""
    if image.format != "PNG" or image.info.keys() & {"exif", "Raw profile type exif"}:
        return True
    with open(name, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:  # length and type of a chunk, before its data and a 4-byte checksum
            if head[4:] == b"eXIf":
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    return False


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error):  # damaged EXIF; the pixels may be intact
        return 1


def _check_size(name: str, width: int, height: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise UserError(
            f"{name}: {width} × {height} pixels exceed the limit of {limit / 1e6:.0f} megapixels; "
            "cut it into tiles or downscale it first"
        )
    if not width or not height:
        raise UserError(f"{name}: an image without pixels ({width} × {height}); replace or remove it")


def _refuse_vector_graphics(image: Image.Image) -> None:
    if image.format in ("EPS", "WMF"):  # Pillow would run Ghostscript on a PostScript program
        raise ValueError(f"{image.format} is a vector format, which is not supported")


def _open(file: str | io.BytesIO, name: str) -> Tensor:
    try:
        image = Image.open(file)
    except Exception as error:  # decoders raise any exception for damaged data
        raise _unreadable(name, error) from error
    with image:
        return _decode(image, name)


def _decode(image: Image.Image, name: str) -> Tensor:
    _check_size(name, *image.size)
    try:
        _refuse_vector_graphics(image)
        image.load()
        return _to_tensor(_to_rgb(ImageOps.exif_transpose(image) if _orientation(image) != 1 else image))
    except Exception as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> UserError:
    if isinstance(error, Image.DecompressionBombError):
        return UserError(f"{name}: too many pixels to be safe ({error}); cut it into tiles or downscale it first")
    if isinstance(error, UnidentifiedImageError):  # its message can contain a memory address
        reason = "unknown image format"
    else:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UserError(f"{name}: cannot be read as an image ({' '.join(reason.split())}); replace or remove it")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image).astype(np.float64)
        if image.mode == "F":
            values = _scale_float(values)
        else:
            values = values / 257 if values.min() >= 0 and values.max() <= 65535 else _stretch(values)
        return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _scale_float(values: np.ndarray) -> np.ndarray:
    values = np.where(np.isfinite(values), values, 0.0)
    if values.min() < 0 or values.max() > 255:
        return _stretch(values)
    return values * 255 if values.max() <= 1 else values


def _stretch(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)


def _from_array(array: np.ndarray) -> Image.Image:
    pixels = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    color = pixels.ndim == 3 and pixels.shape[2] in (3, 4) and pixels.dtype == np.uint8
    gray = pixels.ndim == 2 and pixels.dtype in (np.uint8, np.uint16)
    if not (color or gray) or 0 in pixels.shape:
        raise UserError(f"an image array must be uint8 of shape (H, W, 3), not {array.dtype} of shape {array.shape}")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _from_tensor(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.uint8 or tensor.ndim != 3 or tensor.shape[0] not in (1, 3) or not tensor.numel():
        kind = f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
        raise UserError(f"an image tensor must be uint8 of shape (3, H, W), not {kind}")
    return tensor.detach().cpu().expand(3, -1, -1).clone(memory_format=torch.contiguous_format)


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
