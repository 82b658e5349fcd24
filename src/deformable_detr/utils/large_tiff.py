"""TIFF and BigTIFF files that are larger than memory: parts of them are read."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from .errors import UserError
from .images import ImageSource, from_tiff, is_large, one_line_errors, open_file, read_image
from .tiff import TiffLayout, as_colors, read_layout, require_tifffile
from .tiles import Window

CACHE_BYTES = 256 * 2**20  # of decoded segments, which the next window needs again
MAX_SEGMENT_BYTES = 256 * 2**20
ROWS = 64  # of uncompressed strips that are read at once; a strip may be the whole image
# Decoders that never return more than a segment's size.
_COMPRESSIONS = {1: "none", 5: "LZW", 7: "JPEG", 8: "deflate", 32773: "PackBits", 32946: "deflate", 50000: "zstd"}


def open_image(source: ImageSource) -> "Tensor | LargeTiff":
    """Read an image as `read_image` does. A TIFF file with more pixels than that allows is opened as `LargeTiff`.

    Raises UserError as both do.
    """
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        file = open_file(name)
        with one_line_errors(name, file):
            layout = read_layout(file)
            if layout is not None and is_large(*layout.size):
                return LargeTiff(file, layout, name)
        file.close()
    return read_image(source)


def read_or_name(path: str) -> Tensor | Path:
    """Read an image as `read_image` does; return the path of one that `open_image` opens as `LargeTiff`."""
    image = open_image(path)
    if isinstance(image, Tensor):
        return image
    image.close()
    return Path(path)


class LargeTiff:
    """The first page of a TIFF file: 8-bit or unsigned 16-bit, gray, RGB or CMYK, in tiles or strips.

    Raises:
        UserError: It is damaged, cut off or in another layout, or tifffile is not installed.

    Attributes:
        size: (height, width) in pixels.
    """

    def __init__(self, file: IO[bytes], layout: TiffLayout, name: str) -> None:
        self.layout, self.name, self._file = layout, name, file
        tifffile = require_tifffile(layout._replace(photometric=2) if layout.photometric == 6 else layout, name)
        self._check_layout()
        file.seek(0)
        self._page: Any = tifffile.TiffFile(file).pages[0]
        page = self._page
        self.size: tuple[int, int] = (page.imagelength, page.imagewidth)
        self._planes = layout.samples if layout.planar else 1
        plain = page.is_contiguous and page.predictor == 1 and page.fillorder == 1 and not page.is_tiled
        strip = (ROWS if plain else min(page.rowsperstrip, page.imagelength), page.imagewidth)
        self._sides = (page.tilelength, page.tilewidth) if page.is_tiled else strip  # height and width of a segment
        self._grid = tuple(-(-side // part) for side, part in zip(self.size, self._sides, strict=True))
        self._check_segments(plain)
        segment_bytes = self._sides[0] * self._sides[1] * page.dtype.itemsize * layout.samples // self._planes
        if segment_bytes > MAX_SEGMENT_BYTES:
            raise UserError(
                f"{name}: stored in pieces of {segment_bytes / 1e6:.0f} MB, so that parts of it cannot be read; "
                "save it as a tiled TIFF"
            )
        read: Callable[..., np.ndarray] = self._read_rows if plain else self._decode
        self._segment = functools.lru_cache(max(1, CACHE_BYTES // segment_bytes))(read)

    def _check_layout(self) -> None:
        layout = self.layout
        if layout.bits not in (8, 16) or layout.sample_format != 1:
            raise UserError(f"{self.name}: {layout} is too large to be read at once; convert it to 8-bit RGB")
        if layout.orientation not in (None, 1):
            raise UserError(f"{self.name}: too large to be rotated (orientation {layout.orientation}); rotate it first")

    def _check_segments(self, plain: bool) -> None:
        page = self._page
        if page.compression not in _COMPRESSIONS or (self.layout.photometric == 6 and page.compression != 7):
            names = ", ".join(dict.fromkeys(_COMPRESSIONS.values()))
            raise UserError(f"{self.name}: too large for its compression; save it as RGB with one of {names}")
        ends = np.asarray(page.dataoffsets, dtype=np.uint64) + np.asarray(page.databytecounts, dtype=np.uint64)
        expected = 1 if plain else self._planes * self._grid[0] * self._grid[1]
        if len(ends) < expected or int(ends.max()) > page.parent.filehandle.size:
            raise ValueError("image file is truncated")

    def read(self, window: Window) -> Tensor:
        """Return the pixels of a window inside the image as uint8 RGB (3, height, width). Raises UserError if damaged.

        Neighboring windows are fast one after the other, row by row. Not for several threads at once.
        """
        with one_line_errors(self.name):
            pixels = np.stack([self._assemble(window, plane) for plane in range(self._planes)])
            return from_tiff(as_colors(pixels, self.layout), self.layout)

    def close(self) -> None:
        """Close the file."""
        self._segment.cache_clear()
        self._file.close()

    def _assemble(self, window: Window, plane: int) -> np.ndarray:
        """Return a window (height, width, samples) of one plane as stored."""
        samples = self.layout.samples // self._planes
        pixels = np.zeros((window.height, window.width, samples), self._page.dtype)
        (rows, columns), (left, top, right, bottom) = self._sides, window.box
        for row in range(top // rows, -(-bottom // rows)):
            for column in range(left // columns, -(-right // columns)):
                segment, y, x = self._segment(plane, row, column), row * rows, column * columns
                part = segment[max(top - y, 0) : bottom - y, max(left - x, 0) : right - x]
                y, x = max(y - top, 0), max(x - left, 0)
                pixels[y : y + part.shape[0], x : x + part.shape[1]] = part
        return pixels

    def _decode(self, plane: int, row: int, column: int) -> np.ndarray:
        """Return a tile or strip (h, w, samples); a missing one has the value of missing pixels."""
        page, (down, across) = self._page, self._grid
        index = (plane * down + row) * across + column
        if count := page.databytecounts[index]:
            handle = page.parent.filehandle
            handle.seek(page.dataoffsets[index])
            data = handle.read(count)  # before `decode` is built, which reads the file too
            segment = page.decode(data, index, jpegtables=page.jpegtables)[0]
            if segment is not None:
                return segment[0]
        missing = self.layout.nodata or 0
        value = missing if missing in range(2**self.layout.bits) else 0
        return np.full((*self._sides, 1), value, page.dtype)

    def _read_rows(self, plane: int, row: int, column: int) -> np.ndarray:
        """Return `ROWS` rows (h, w, samples) of an uncompressed image."""
        page, samples = self._page, self.layout.samples // self._planes
        rows = min(ROWS, self.size[0] - row * ROWS)
        row_bytes = self.size[1] * samples * page.dtype.itemsize
        handle = page.parent.filehandle
        handle.seek(page.dataoffsets[0] + (plane * self.size[0] + row * ROWS) * row_bytes)
        stored = np.frombuffer(handle.read(rows * row_bytes), page.dtype.newbyteorder(page.parent.byteorder))
        return stored.reshape(rows, self.size[1], samples).astype(page.dtype)
