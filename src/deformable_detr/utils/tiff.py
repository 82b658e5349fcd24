"""TIFF layouts: which of them Pillow reads right, and how the others are read through tifffile."""

import contextlib
import math
import re
from typing import IO, Any, NamedTuple, Self

import numpy as np
from PIL.TiffImagePlugin import PREFIXES, ImageFileDirectory_v2

from .errors import UserError

_PHOTOMETRIC = {0: "inverted gray", 1: "gray", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "Lab"}
_THUMBNAIL = -1
_PHOTOMETRIC[_THUMBNAIL] = "camera raw, or a thumbnail of another page"
_SAMPLE_FORMATS = {1: "integer", 2: "signed integer", 3: "float"}
# Written by GIS tools for missing values, also without the tag that declares it.
_SENTINELS = (-9999, -99999, -32768, -32767, -3.4028234663852886e38, 3.4028234663852886e38, -1e30, -1e10, 1e20)
MAX_BYTES_PER_PIXEL = 64


class TiffLayout(NamedTuple):
    """What the tags of a TIFF page say about its pixels."""

    size: tuple[int, int]  # (width, height) as stored
    bits: int  # per sample; 0: samples differ
    sample_format: int  # 1 unsigned, 2 signed, 3 float
    samples: int  # per pixel
    planar: bool  # one plane per sample
    photometric: int
    compressed: bool
    alpha: bool  # the sample after the colors is opacity
    nodata: float | None  # GDAL's value of missing pixels
    orientation: Any  # of the tag, otherwise of XMP

    @classmethod
    def from_tags(cls, tags: Any) -> Self:
        def first(tag: int, default: Any) -> Any:
            value = tags.get(tag, default)
            return value[0] if isinstance(value, tuple) and value else value

        if 256 not in tags or 257 not in tags:
            raise ValueError("a TIFF without width and height")
        bits, formats = (set(tags.get(tag) or (1,)) for tag in (258, 339))
        if len(formats) > 1:
            raise ValueError("a TIFF whose samples have several formats")
        nodata = None
        with contextlib.suppress(ValueError, TypeError):
            nodata = float(str(first(42113, "")).strip(" \0"))
        colors = {2: 3, 5: 4}.get(first(262, 1), 1)
        extra = tags.get(338) or ()
        alpha = bool(extra) and extra[0] in (1, 2) and first(277, 1) > colors
        # NEF, ARW and others are TIFF files that begin with a thumbnail; 50706 is the version of DNG.
        is_thumbnail = 50706 in tags or (first(254, 0) & 1 and (330 in tags or bool(tags.next)))
        return cls(
            (int(first(256, 0)), int(first(257, 0))), bits.pop() if len(bits) == 1 else 0,
            1 if first(339, 1) == 4 else first(339, 1), first(277, 1), first(284, 1) == 2,
            _THUMBNAIL if is_thumbnail else first(262, 1),
            first(259, 1) != 1, alpha, nodata, first(274, None) if 274 in tags else _xmp_orientation(tags.get(700)),
        )  # fmt: skip

    @property
    def pillow_reads(self) -> bool:
        """Return whether Pillow reads the pixels right, if it opens the file at all."""
        if self.photometric == _THUMBNAIL or (self.planar and self.samples == 2):
            return False
        gray = self.samples == 1 and self.photometric == 1
        if self.sample_format == 3:
            return gray and self.bits == 32
        if self.sample_format == 2:
            return gray and self.bits in (16, 32)
        if self.bits == 16:
            return gray or (not self.planar and self.photometric in (2, 5))
        return (self.bits <= 8 and self.bits > 0) or (gray and self.bits in (12, 32))

    @property
    def value_bits(self) -> int:
        """Bits of a value without its sign."""
        return self.bits - (self.sample_format == 2)

    def __str__(self) -> str:
        kind = f"{self.bits}-bit {_SAMPLE_FORMATS.get(self.sample_format, 'complex')}" if self.bits else "mixed bits"
        planes = ", in planes" if self.planar and self.samples > 1 else ""
        color = _PHOTOMETRIC.get(self.photometric, f"photometric {self.photometric}")
        return f"a TIFF of {self.samples} × {kind} ({color}{planes})"


def _xmp_orientation(xmp: Any) -> int | None:
    match = re.search(rb'tiff:Orientation(="|>)([0-9])', xmp) if isinstance(xmp, bytes) else None  # as Pillow does
    return int(match[2]) if match else None


def read_layout(file: IO[bytes]) -> TiffLayout | None:
    """Return the layout of the first page, or None if the file is not a TIFF. Raises any exception for damage."""
    file.seek(0)
    header = file.read(8)
    if not header.startswith(tuple(PREFIXES)):
        return None
    if header[2] == 43:
        header += file.read(8)
    directory = ImageFileDirectory_v2(header)
    if header[3] == 43:  # Pillow takes a big-endian BigTIFF for a TIFF
        directory._bigtiff, directory.next = True, int.from_bytes(file.read(8), "big")
    elif file.read(2) == b"CR":
        raise ValueError("a camera raw image of Canon")
    file.seek(directory.next)
    directory.load(file)
    return TiffLayout.from_tags(directory)


def read_page(file: IO[bytes], layout: TiffLayout, page: int, name: str) -> np.ndarray:
    """Read what Pillow does not, as stored: (H, W) or (H, W, 3); with opacity, (H, W, 2) or (H, W, 4).

    Of more bands, the first three are red, green and blue.

    Raises:
        UserError: tifffile is not installed, or the layout is not supported.
    """
    tifffile = require_tifffile(layout, name)
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        part = tiff.pages[page]
        if max(map(sum, zip(part.dataoffsets, part.databytecounts, strict=True)), default=0) > tiff.filehandle.size:
            raise ValueError("image file is truncated")
        if part.nbytes > MAX_BYTES_PER_PIXEL * max(1, math.prod(layout.size)):
            raise ValueError(f"{layout}, too many bands")
        pixels = part.asarray()
    pixels = pixels.reshape(part.shaped)[:, 0]  # (planes, H, W, samples)
    return as_colors(pixels, layout)


def as_colors(pixels: np.ndarray, layout: TiffLayout) -> np.ndarray:
    """Return stored values (planes, H, W, samples) as `read_page` does."""
    pixels = np.moveaxis(pixels[..., 0], 0, -1) if layout.planar and layout.samples > 1 else pixels[0]
    if layout.photometric == 5:
        full = 1 if pixels.dtype.kind == "f" else np.iinfo(pixels.dtype).max
        ink = pixels[..., :4].astype(np.float64) / full
        return np.rint((1 - ink[..., :3]) * (1 - ink[..., 3:]) * 255).clip(0, 255).astype(np.uint8)
    colors = 3 if pixels.shape[2] > 2 else 1
    count = colors + (layout.alpha and layout.samples == colors + 1)
    return pixels[..., :count] if count > 1 else pixels[..., 0]


def require_tifffile(layout: TiffLayout, name: str) -> Any:
    """Return tifffile. Raise UserError if it is not installed or does not read the layout."""
    supported = layout.photometric in (0, 1, 2, 5) and layout.sample_format in (1, 2, 3) and layout.bits
    if not supported:
        raise UserError(f"{name}: {layout} is not supported; convert it to 8-bit RGB")
    try:
        import tifffile
    except ImportError:
        raise UserError(
            f"{name}: {layout} needs tifffile: pip install 'deformable-detr[tiff]', or convert it to 8-bit RGB"
        ) from None
    return tifffile


def to_uint8(values: np.ndarray, bits: int = 16, nodata: float | None = None, invert: bool = False) -> np.ndarray:
    """Scale values (H, W) or (H, W, C) to uint8; missing values become black.

    uint8 stays. Integers in the range of `bits` are read in that range; floats in 0..1 or 0..255 in that one. Others
    are stretched to 0..255: from 0, or from their minimum if that is negative or above a quarter of the maximum.
    Missing are NaN, infinities, `nodata`, and usual sentinels such as -9999 that lie far from all other values.
    """
    missing = _missing(values, nodata)
    if values.dtype == np.uint8:
        scaled = values
    else:
        valid = values[~missing]
        low, high = (float(valid.min()), float(valid.max())) if valid.size else (0.0, 0.0)
        scale, low = _scale(values.dtype, low, high, bits)
        with np.errstate(invalid="ignore", over="ignore"):
            levels = (np.where(missing, low, values).astype(np.float64) - low) * scale
        scaled = np.rint(levels).clip(0, 255).astype(np.uint8)
    scaled = 255 - scaled if invert else scaled
    return np.where(missing, np.uint8(0), scaled)


def _missing(values: np.ndarray, nodata: float | None) -> np.ndarray:
    """Return where pixels have no value; of several bands, where none has one."""
    missing = ~np.isfinite(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)
    candidates = [] if nodata is None else [nodata]
    if values.dtype.kind in "fi" and not missing.all():
        finite = values[~missing]
        for low in (True, False):
            extreme = float(finite.min() if low else finite.max())
            rest = finite[finite != extreme].astype(np.float64)
            is_sentinel = any(math.isclose(extreme, value, rel_tol=1e-6) for value in _SENTINELS)
            if is_sentinel and rest.size and np.abs(rest - extreme).min() > np.ptp(rest):
                candidates.append(extreme)
    for value in candidates:
        with np.errstate(over="ignore"):
            equal = values == (values.dtype.type(value) if values.dtype.kind == "f" else value)
        missing |= equal if equal.ndim == 2 else equal.all(-1, keepdims=True)
    return missing


def _scale(dtype: np.dtype, low: float, high: float, bits: int) -> tuple[float, float]:
    """Return the factor to levels and the value of level 0."""
    if dtype.kind == "f":
        if low >= 0 and high <= 255:
            return (255.0 if high <= 1 else 1.0), 0.0
    elif low >= 0:
        if high < 2**bits and bits <= 16:
            return 255 / (2**bits - 1), 0.0
        if high > np.iinfo(dtype).max / 2:
            return 255 / float(np.iinfo(dtype).max), 0.0
    low = 0.0 if 0 <= low <= high / 4 else low
    return (255 / (high - low) if high > low else 0.0), low
