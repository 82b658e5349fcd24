"""Overlapping tiles of a large image."""

import math
from typing import NamedTuple, TypedDict

from .errors import UserError

DEFAULT_OVERLAP = 0.2
MIN_TILE, MAX_OVERLAP = 32, 0.9
MAX_TILES = 100_000  # of an image; with the defaults at 640 pixels, one of 26 gigapixels


class Window(NamedTuple):
    """A part of an image in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x1, y1, x2, y2."""
        return self.left, self.top, self.left + self.width, self.top + self.height


class Tiling(NamedTuple):
    """How large images are cut: side of a tile in pixels, minimum overlap as a share of it, and tiles per batch."""

    tile: int
    overlap: float = DEFAULT_OVERLAP
    batch_size: int = 1

    def divides(self, height: int, width: int) -> bool:
        """Return whether an image has more than one tile."""
        return max(height, width) > self.tile

    def count(self, height: int, width: int) -> int:
        """Return the number of tiles of an image."""
        return math.prod(_gaps(side, self.tile, self.overlap) + 1 for side in (height, width))

    def windows(self, height: int, width: int) -> list[Window]:
        """Return the tiles of an image; see `tile_grid`."""
        return tile_grid(height, width, self.tile, self.overlap)


class TileOptions(TypedDict, total=False):
    """The settings of tiles, as in `predict`."""

    tile: int | None
    tile_overlap: float


def check_tiling(tile: int | None = None, tile_overlap: float = DEFAULT_OVERLAP, batch_size: int = 1) -> Tiling | None:
    """Return the settings, or None without `tile`. Raises UserError if one is out of range."""
    if tile is None:
        return None
    check_tiles(tile, tile_overlap)
    return Tiling(tile, tile_overlap, batch_size)


def tile_grid(height: int, width: int, tile: int, overlap: float = DEFAULT_OVERLAP) -> list[Window]:
    """Return the tiles of an image, row by row. They cover it, and none extends beyond it.

    All have the same size: `tile`, or the image's side where that is shorter. They are evenly spaced from border to
    border, so that neighbors share at least `overlap` · `tile` pixels: an object of this size is whole in a tile.

    Args:
        height, width: Sides of the image in pixels.
        tile: Side of a tile in pixels.
        overlap: Minimum share of a tile's side that two neighbors have in common, 0 to 0.9.

    Raises:
        UserError: A setting is out of range, or there would be more than `MAX_TILES` tiles.
    """
    check_tiles(tile, overlap)
    if (count := Tiling(tile, overlap).count(height, width)) > MAX_TILES:
        raise UserError(f"tile {tile}: {width} × {height} pixels have {count} tiles; use larger ones")
    tops, lefts = _starts(height, tile, overlap), _starts(width, tile, overlap)
    return [Window(top, left, min(tile, height), min(tile, width)) for top in tops for left in lefts]


def check_tiles(tile: int, overlap: float = DEFAULT_OVERLAP) -> None:
    """Raise UserError if a setting of `tile_grid` is out of range."""
    if tile < MIN_TILE:
        raise UserError(f"tile {tile}: must be at least {MIN_TILE} pixels")
    if not 0 <= overlap <= MAX_OVERLAP:
        raise UserError(f"tile_overlap {overlap}: must be from 0 to {MAX_OVERLAP}")


def _gaps(side: int, tile: int, overlap: float) -> int:
    """Return the number of tiles along one side, minus 1."""
    stride = max(1, int(tile * (1 - overlap)))
    return max(0, -(-(side - tile) // stride))


def _starts(side: int, tile: int, overlap: float) -> list[int]:
    """Return where the tiles along one side start."""
    gaps = _gaps(side, tile, overlap)
    return [number * (side - tile) // gaps for number in range(gaps + 1)] if gaps else [0]
