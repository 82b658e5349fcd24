"""Read images of any format into upright uint8 RGB tensors."""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from .errors import UserError
from .files import open_regular
from .png import without_texts
from .tiff import TiffLayout, read_layout, read_page, require_tifffile, to_uint8

TRANSPOSED_ORIENTATIONS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_TRANSPOSE = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True))  # to `Image.Transpose`
# What files with the name of an image hold instead: signature, what it is, what to do.
_OTHER_CONTENT = (
    (rb"(?s)....ftyp(?!.{,40}avi[fs])(?:hei|hev|mif1|msf1)", "a HEIC image", "convert it to JPEG"),
    (rb"(?s)....ftypcrx|II\*\0....CR|FUJIFILMCCD-RAW|II(?:RO|U\0)", "a camera raw image", "convert it to JPEG"),
    (rb"(?s)....ftyp(?!.{,40}avi[fs])", "a video", "extract its frames"),
    (rb"%PDF", "a PDF", "export its pages as PNG"),
    (rb"(?i)(?:\xef\xbb\xbf)?\s*<(?:!doctype )?html", "an HTML page, as failed downloads leave", "download it again"),
    (rb"version https://git-lfs", "a Git LFS pointer", "run `git lfs pull`"),
    (rb"(?s)(?:\xef\xbb\xbf)?\s*(?:<\?xml.{0,400}?)?<svg", "an SVG drawing", "convert it to PNG"),
    (rb"(?s)\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL image", "convert it to JPEG"),
    (rb"v/1\x01", "an OpenEXR image", "convert it to PNG or TIFF"),
    (rb"(?s).{128}DICM", "a DICOM image", "convert it to PNG"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!", "an archive", "unpack it"),
)

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor


def read_image(source: ImageSource) -> Tensor:
    """Read an image as uint8 RGB, (3, H, W), on the CPU; the result shares no memory with the source.

    - The orientation of EXIF is applied, otherwise that of XMP (`tiff:Orientation`).
    - Transparent pixels are blended with white.
    - 16-bit gray is divided by 257, so 65535 becomes 255. 12-bit TIFF is scaled likewise.
    - Other integers and floats are scaled as `tiff.to_uint8` describes; missing values (NaN, GDAL's nodata) are black.
    - TIFF layouts that Pillow misreads (16-bit planes, float colors, more bands, …) need the extra `tiff`.

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
        return _from_image(source, getattr(source, "filename", "") or "")
    if not isinstance(source, str | os.PathLike):
        hint = "; open it with PIL.Image.open" if hasattr(source, "read") else ""
        raise UserError(f"an image must be a path, PIL image, array or tensor, not {type(source).__name__}{hint}")
    name = os.fspath(source)
    with open_file(name) as file:
        return _read(file, name)


def decode_image(data: bytes, name: str) -> Tensor:
    """Decode the bytes of an image file as `read_image` does; errors call it `name`."""
    return _read(io.BytesIO(data), name)


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return (height, width) of the upright image from the file's header. Raises UserError as `read_image` does."""
    return read_header(path)[0]


def read_header(path: str | os.PathLike[str]) -> tuple[tuple[int, int], int, int]:
    """Return the size as `read_size` does, the orientation, 1 to 8, and the bits per sample; 8 stands for fewer too."""
    name = os.fspath(path)
    with open_file(name) as file, one_line_errors(name, file):
        if layout := read_layout(file):
            if not _pillow_opens(file, layout):
                require_tifffile(layout, name)
            (width, height), orientation, bits = layout.size, _valid(layout.orientation), max(8, layout.bits)
        else:
            with _open_image(file, pixels=False) as image:
                (width, height), orientation = image.size, _orientation(image)
                bits = 16 if image.mode == "I" or ";16" in f"{image.mode} {getattr(image, 'tile', [])}" else 8
    _check_size(name, width, height)
    return ((width, height) if orientation in TRANSPOSED_ORIENTATIONS else (height, width)), orientation, bits


def refuse_address(name: str) -> None:
    """Raise UserError for a URL, which paths write with one slash. The message leaves out user and password."""
    if address := re.fullmatch(r"(?s)([A-Za-z][\w+.-]+:)/+(?:[^/]*@)?(.*)", name):
        hint = "download the file, or record the stream with FFmpeg"
        raise UserError(f"{address[1]}//{address[2]}: addresses are not read; {hint}")


def open_file(name: str) -> IO[bytes]:
    """Open an image file. Raises UserError if it is missing or cannot be read."""
    if not os.path.exists(name):
        refuse_address(name)
        raise UserError(f"{name}: no such image file; add the file or remove its entry")
    try:
        return open_regular(name)
    except OSError as error:
        raise _unreadable(name, error) from error


def _orientation(image: Image.Image) -> int:
    """Return the orientation of EXIF, or of XMP if EXIF has none: Pillow's rule. Invalid ones count as 1."""
    try:
        return _valid(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF raises any exception; the pixels may be intact
        return 1


def _valid(orientation: Any) -> int:
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def is_large(width: int, height: int) -> bool:
    """Return whether an image has more pixels than are read at once."""
    return Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS


def _check_size(name: str, width: int, height: int) -> None:
    if is_large(width, height):
        raise UserError(
            f"{name}: {width} × {height} pixels exceed the limit of {(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} "
            "megapixels; cut it into tiles or downscale it first"
        )
    if not width or not height:
        raise UserError(f"{name}: an image without pixels ({width} × {height}); replace or remove it")


def _pillow_opens(file: IO[bytes], layout: TiffLayout) -> bool:
    """Return whether Pillow knows the layout and compression of a TIFF, and reads it right."""
    try:
        return layout.pillow_reads and bool(Image.open(file))
    except (UnidentifiedImageError, KeyError):
        return False


def _open_image(file: IO[bytes], pixels: bool = True) -> Image.Image:
    stream, info = without_texts(file, pixels)
    image = Image.open(stream)
    if image.format == "PNG":
        image.info |= info
    _refuse_vector_graphics(image)
    return image


def _refuse_vector_graphics(image: Image.Image) -> None:
    if image.format in ("EPS", "WMF"):  # Pillow would run Ghostscript on a PostScript program
        raise ValueError(f"{image.format} is a vector format, which is not supported")


def _read(file: IO[bytes], name: str) -> Tensor:
    with one_line_errors(name, file):
        layout = read_layout(file)
        if layout:
            _check_size(name, *layout.size)
            if not _pillow_opens(file, layout):
                return _read_tiff(file, layout, name)
        with _open_image(file) as image:
            return _decode(image, name)


def _decode(image: Image.Image, name: str) -> Tensor:
    with one_line_errors(name):
        _check_size(name, *image.size)
        _refuse_vector_graphics(image)
        tags, file = getattr(image, "tag_v2", None), getattr(image, "fp", None)
        layout = TiffLayout.from_tags(tags) if image.format == "TIFF" and tags else None
        if layout and not layout.pillow_reads:
            if file is None:  # closed, or loaded
                raise UserError(f"{name}: Pillow misreads {layout}; pass the path instead of the PIL image")
            return _read_tiff(file, layout, name, image.tell())
        image.load()  # rotates TIFF
        upright = image if image.format == "TIFF" else _rotate(image, _orientation(image))
        if layout and tags and upright.mode == "P" and max(tags.get(320, (256,))) < 256:  # libtiff's rule
            upright = upright.copy()
            upright.putpalette(np.reshape(tags[320], (3, -1)).T.astype(np.uint8).tobytes())
        return _to_tensor(_to_rgb(upright, layout))


def _read_tiff(file: IO[bytes], layout: TiffLayout, name: str, page: int = 0) -> Tensor:
    pixels = read_page(file, layout, page, name)
    return from_tiff(pixels, layout)


def from_tiff(pixels: np.ndarray, layout: TiffLayout) -> Tensor:
    """Return values as `tiff.as_colors` returns them as upright uint8 RGB (3, H, W)."""
    levels = to_uint8(pixels, layout.value_bits, layout.nodata, invert=layout.photometric == 0)
    return _to_tensor(_to_rgb(_rotate(Image.fromarray(levels), _valid(layout.orientation))))


def _rotate(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(Image.Transpose(_TRANSPOSE[orientation])) if orientation != 1 else image


@contextmanager
def one_line_errors(name: str, file: IO[bytes] | None = None) -> Iterator[None]:
    """Raise UserError for any exception; decoders raise any for damaged data."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        head = b""
        if file is not None:
            file.seek(0)
            head = file.read(512)
        raise _unreadable(name, error, head) from error


def _unreadable(name: str, error: Exception, head: bytes = b"") -> UserError:
    if isinstance(error, Image.DecompressionBombError):
        return UserError(f"{name}: too many pixels to be safe ({error}); cut it into tiles or downscale it first")
    for signature, content, hint in _OTHER_CONTENT:
        if re.match(signature, head):
            return UserError(f"{name}: cannot be read as an image (it is {content}); {hint}")
    if isinstance(error, UnidentifiedImageError):  # its message can contain a memory address
        reason = "unknown image format"
    else:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UserError(f"{name}: cannot be read as an image ({' '.join(reason.split())}); replace or remove it")


def _to_rgb(image: Image.Image, layout: TiffLayout | None = None) -> Image.Image:
    nodata = layout.nodata if layout else None
    if image.mode.startswith("I;16") or image.mode in ("I", "F") or (nodata is not None and image.mode in ("L", "RGB")):
        values = np.asarray(image)
        if layout and layout.bits == 32 and layout.sample_format == 1:
            values = values.view(np.uint32)
        levels = to_uint8(values, layout.value_bits if layout else 16, nodata)
        if isinstance(transparent := image.info.get("transparency"), int):
            levels = np.where(values == transparent, np.uint8(255), levels)
        return Image.fromarray(levels).convert("RGB")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _from_image(image: Image.Image, filename: str | bytes) -> Tensor:
    path = os.fsdecode(filename)
    try:
        return _decode(image, path or "the PIL image")
    except UserError as error:
        cause = error.__cause__
        unloaded = getattr(image, "tile", None) and getattr(image, "fp", None) is None
        if unloaded or (isinstance(cause, ValueError) and "closed" in str(cause)):
            name, hint = (f"the PIL image {path}", ", or pass its path") if path else ("the PIL image", "")
            raise UserError(f"{name} is closed; open it again{hint}") from error
        raise


def _from_array(array: np.ndarray) -> Image.Image:
    pixels = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
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
