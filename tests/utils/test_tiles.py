"""The grid of tiles: it covers the image, stays inside it, and neighbors share enough."""

import re

import numpy as np
import pytest

from deformable_detr.utils.errors import UserError
from deformable_detr.utils.tiles import Window, tile_grid


@pytest.mark.parametrize("overlap", [0, 0.2, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(("height", "width"), [(640, 640), (641, 640), (100, 3000), (4000, 4000), (1279, 1153), (1, 1)])
def test_tiles_cover_the_image_with_the_overlap_and_end_at_its_borders(height, width, overlap):
    windows = tile_grid(height, width, 640, overlap)
    covered = np.zeros((height, width), dtype=bool)
    for top, left, h, w in windows:
        assert (h, w) == (min(640, height), min(640, width))
        assert min(top, left, height - top - h, width - left - w) >= 0
        covered[top : top + h, left : left + w] = True
    assert covered.all()
    assert (windows[0].top, windows[0].left) == (0, 0)
    assert windows[-1].box[2:] == (width, height)
    for starts in (sorted({window.top for window in windows}), sorted({window.left for window in windows})):
        assert (np.diff(starts) <= 640 - int(640 * overlap)).all()
    assert windows == sorted(set(windows))


def test_the_number_of_tiles_is_the_smallest_possible():
    assert len(tile_grid(640 + 512, 640, 640)) == 2
    assert len(tile_grid(640 + 513, 640, 640)) == 3
    assert tile_grid(640, 640, 640) == [Window(0, 0, 640, 640)]
    assert tile_grid(10, 20, 640) == [Window(0, 0, 10, 20)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 100, 31), "tile 31: must be at least 32 pixels"),
        ((100, 100, 64, -0.1), "tile_overlap -0.1: must be from 0 to 0.9"),
        ((100, 100, 64, 1.0), "tile_overlap 1.0: must be from 0 to 0.9"),
        ((100, 100, 64, float("nan")), "tile_overlap nan: must be from 0 to 0.9"),
        ((10**6, 10**6, 64), "tile 64: 1000000 × 1000000 pixels have 384473664 tiles; use larger ones"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        tile_grid(*arguments)
