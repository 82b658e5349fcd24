"""Training on tiles of large images, with the views of a prediction with tiles: tiles and the whole image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..config.image_size import ModelResize
from ..structures import Target
from ..utils.errors import UserError
from ..utils.images import read_size
from ..utils.tiles import DEFAULT_OVERLAP, Window, tile_grid
from .dataset import CocoDataset, Transform
from .issues import TINY_SIDE
from .masks import move_objects
from .records import clip_corners
from .sampling import EpochSampling, repeat_factors
from .transforms import crop

# Smallest share of its area by which a tile shows an object: SAHI's min_area_ratio, Ultralytics' area_thr.
MIN_AREA = 0.1
MAX_SHIFT = DEFAULT_OVERLAP / 2  # of a tile's side: shifted neighbors still touch


class TiledDataset(Dataset[tuple[Tensor, Target]]):
    """Wrap a dataset so that each sample is a view: a tile of a large image, or an image as a whole.

    Images no larger than a tile are used whole. A larger one has the tiles of a prediction (`tile_grid`), and is also
    used whole, as in a prediction. A tile with objects is shown in each epoch, one without in some.

    - Each time, a tile is shifted by up to a tenth of its side in both directions; one of its objects stays.
    - An object is in a tile if at least `MIN_AREA` of its box is inside. Its box is clipped to the tile: a prediction
      merges such pieces. A smaller part counts as background, because a neighboring tile shows more of the object.
    - In a large image as a whole, objects whose mean side would be under `TINY_SIDE` pixels are background: they are
      learned from tiles.

    Args:
        dataset: The images.
        tile: Side of a tile in pixels.
        empty_share: Share of the samples of an epoch that are views of large images without objects, 0..1.
        rule: Resize of the model; it decides which objects are tiny.
    """

    def __init__(self, dataset: CocoDataset, tile: int, empty_share: float, rule: ModelResize) -> None:
        self.dataset, self.tile, self.rule = dataset, tile, rule
        self._last: tuple[int, tuple[Tensor, Target]] | None = None
        views, self._object_views, self._object_labels = self._find_views()
        self._images, self._windows = views[:, 0], views[:, 1:5]
        self._whole, self._large = views[:, 5:].T > 0
        self._always = ~self._large
        self._always[self._object_views] = True
        always, rare = int(self._always.sum()), int((~self._always).sum())
        drawn = min(rare, round(always * empty_share / (1 - empty_share)))
        self._frequencies = np.where(self._always, 1.0, drawn / max(rare, 1))

    @property
    def transform(self) -> Transform | None:
        """The transform of all samples."""
        return self.dataset.transform

    @property
    def fingerprint(self) -> str:
        """Identifies the annotations."""
        return self.dataset.fingerprint

    @property
    def sizes(self) -> np.ndarray:
        """Height and width of each view, (len, 2)."""
        return self._windows[:, 2:]

    def sampling(self, repeat_threshold: float = 0.0) -> EpochSampling:
        """Return how often an epoch shows each view; a class is as rare as the views with it. See `repeat_factors`."""
        factors = repeat_factors(self._object_views, self._object_labels, self._frequencies, repeat_threshold)
        return EpochSampling(self._frequencies * factors, self._images)

    def draw(self, count: int, generator: torch.Generator) -> list[int]:
        """Draw views that an epoch always shows, for mosaics."""
        views = np.flatnonzero(self._always)
        return views[torch.randint(len(views), (count,), generator=generator).numpy()].tolist()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, view: int) -> tuple[Tensor, Target]:
        return self.finish(*self.load(view))

    def finish(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """Apply the transform, and draw the masks."""
        return self.dataset.finish(image, target)

    def load(self, view: int) -> tuple[Tensor, Target]:
        """Return a view and its objects before the transform. Its shift depends on PyTorch's initial seed."""
        image, target = self._read(int(self._images[view]))
        height, width = image.shape[-2:]
        corners = _corners(target, height, width)
        if self._whole[view]:
            if not self._large[view]:
                return image, target
            return image, _select(target, ~_tiny(corners, self.rule, height, width))
        top, left, h, w = self._windows[view].tolist()
        h, w = min(h, height), min(w, width)  # the file can have another size than its record
        window = Window(min(top, height - h), min(left, width - w), h, w)
        random = np.random.default_rng((torch.default_generator.initial_seed(), view))
        window = _shifted(window, corners, (height, width), int(MAX_SHIFT * self.tile), random)
        return crop(image, _select(target, _shows([window], corners)[0]), *window)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def _read(self, index: int) -> tuple[Tensor, Target]:
        """Return an image, which is decoded once for views that follow each other."""
        if self._last is None or self._last[0] != index:
            self._last = None  # frees its memory first
            self._last = index, self.dataset.load(index)
        return self._last[1]

    def _find_views(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return all views (V, 7), and the view and the label of each object in them (N,).

        Columns: image, top, left, height and width in pixels, whether it is the whole image, whether that has tiles.
        """
        images, labels, boxes = self.dataset.objects
        starts = np.searchsorted(images, np.arange(len(self.dataset) + 1))
        views: list[np.ndarray] = []
        shown: list[tuple[np.ndarray, np.ndarray]] = []
        total = 0
        for index, (height, width) in enumerate(_sizes(self.dataset)):
            rows, large = slice(starts[index], starts[index + 1]), max(height, width) > self.tile
            corners, inside = clip_corners(boxes[rows].astype(np.float64), np.array([[width, height]]))
            windows = [Window(0, 0, height, width), *(tile_grid(height, width, self.tile) if large else ())]
            seen = _shows(windows, corners)
            if large:
                seen[0] = ~_tiny(corners, self.rule, height, width)
            numbers, objects = np.nonzero(seen & inside)
            shown.append((total + numbers, labels[rows][objects]))
            whole = np.arange(len(windows)) == 0
            columns = ([index] * len(windows), np.array(windows), whole, [large] * len(windows))
            views.append(np.column_stack(columns).astype(np.int32))
            total += len(windows)
        object_views, object_labels = (np.concatenate(column) for column in zip(*shown, strict=True))
        return np.concatenate(views), object_views, object_labels


def _sizes(dataset: CocoDataset) -> Iterator[tuple[int, int]]:
    """Yield the (height, width) of each image, from its file if its record has none."""
    for index, (height, width) in enumerate(dataset.sizes.tolist()):
        if height * width == 1:
            with suppress(UserError):  # an unreadable file is reported when it is used
                height, width = read_size(dataset.path(index))
        yield height, width


def _corners(target: Target, height: int, width: int) -> np.ndarray:
    """Return the boxes (N, 4) as xyxy in pixels."""
    cxcywh = target.boxes.numpy().astype(np.float64) * [width, height, width, height]
    return np.concatenate([cxcywh[:, :2] - cxcywh[:, 2:] / 2, cxcywh[:, :2] + cxcywh[:, 2:] / 2], axis=1)


def _select(target: Target, kept: np.ndarray) -> Target:
    indices = torch.from_numpy(np.flatnonzero(kept))
    return move_objects(target, target.boxes[indices], indices)


def _shows(windows: Sequence[Window], corners: np.ndarray) -> np.ndarray:
    """Return which boxes (N, 4) xyxy are objects of which windows, (windows, N)."""
    frames = np.array([window.box for window in windows])[:, None]
    low, high = np.maximum(corners[:, :2], frames[..., :2]), np.minimum(corners[:, 2:], frames[..., 2:])
    visible = (high - low).clip(min=0).prod(-1)
    return (visible >= MIN_AREA * (corners[:, 2:] - corners[:, :2]).prod(-1)) & (visible > 0)


def _tiny(corners: np.ndarray, rule: ModelResize, height: int, width: int) -> np.ndarray:
    """Return which boxes (N, 4) xyxy have a geometric mean side under `TINY_SIDE` after the resize, (N,)."""
    new_height, new_width = rule(height, width)
    scale = new_height * new_width / (height * width)
    return (corners[:, 2:] - corners[:, :2]).prod(1) * scale < TINY_SIDE**2


def _shifted(
    window: Window, corners: np.ndarray, size: tuple[int, int], limit: int, random: np.random.Generator
) -> Window:
    """Move a window by up to `limit` pixels inside the image, so that it shows no less of one of its objects."""
    shown = np.flatnonzero(_shows([window], corners)[0])
    anchor = corners[random.choice(shown)] if len(shown) else None
    starts = []
    for axis, (start, side, total) in enumerate(zip(window[:2], window[2:], size, strict=True)):
        low, high = max(-limit, -start), min(limit, total - start - side)
        if anchor is not None:
            first, last = anchor[1 - axis], anchor[3 - axis]
            low, high = max(low, min(0, np.ceil(last - side - start))), min(high, max(0, np.floor(first - start)))
        starts.append(start + int(random.integers(int(low), int(high) + 1)))
    return Window(starts[0], starts[1], window.height, window.width)
