"""A large image through the model: its tiles, then the whole image; the results are merged."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.image_size import ResizeRule
from ..data.transforms import resize
from ..model.mask_ops import EncodedMasks, MaskLogits
from ..model.postprocess import ScoredBoxes, clip_boxes_to_image
from ..utils.large_tiff import LargeTiff
from ..utils.rle import unite_masks
from ..utils.tiles import Tiling, Window
from .merge import merge_views

Detect = Callable[[Sequence[Tensor], Sequence[tuple[int, int]]], list[ScoredBoxes]]


class TiledImage:
    """The views of an image that is larger than a tile.

    Raises UserError if there are too many tiles.

    Attributes:
        name: What messages call the image, from its source.
        size: (height, width) in pixels.
        windows: The tiles, row by row, and the whole image as the last one.
    """

    def __init__(self, image: Tensor | LargeTiff, tiling: Tiling, rule: ResizeRule, source: Any = None) -> None:
        self.image, self.rule, self.batch_size = image, rule, tiling.batch_size
        self.name = os.fspath(source) if isinstance(source, str | os.PathLike) else "an image"
        self.size: tuple[int, int] = image.size if isinstance(image, LargeTiff) else (image.shape[1], image.shape[2])
        self.windows = [*tiling.windows(*self.size), Window(0, 0, *self.size)]
        self._overview = Overview(self.windows, rule) if isinstance(image, LargeTiff) else None

    def pixels(self, window: Window) -> Tensor:
        """Return a view as the model sees it, (3, h, w) uint8. Of a `LargeTiff`, they must be requested in order."""
        top, left, height, width = window
        if isinstance(self.image, Tensor):
            return resize(self.image[:, top : top + height, left : left + width], self.rule)
        assert self._overview is not None
        if window == self.windows[-1]:
            return self._overview.image()
        pixels = self.image.read(window)
        self._overview.add(window, pixels)
        return resize(pixels, self.rule)

    def batches(self) -> Iterator[tuple[list[Window], list[Tensor]]]:
        """Yield the views in batches. The whole image has a batch of its own: padding would change the scores."""
        tiles, size = self.windows[:-1], self.batch_size
        for windows in (*(tiles[i : i + size] for i in range(0, len(tiles), size)), self.windows[-1:]):
            yield windows, [self.pixels(window) for window in windows]

    def close(self) -> None:
        """Close the file of a `LargeTiff`."""
        if isinstance(self.image, LargeTiff):
            self.image.close()


class Overview:
    """The whole image as the model sees it, from its tiles: means of square cells, which are then resized."""

    def __init__(self, windows: Sequence[Window], rule: ResizeRule) -> None:
        self.size, self.rule = windows[-1][2:], rule
        self._target = rule(*self.size)
        # Cells have at most half the size of the model's pixels, so that the resize decides on the result.
        self._cell = max(1, min(side // (2 * target) for side, target in zip(self.size, self._target, strict=True)))
        self._sums = np.zeros((3, *(-(-side // self._cell) for side in self.size)), dtype=np.uint32)
        starts = (sorted({window[axis] for window in windows[:-1]}) for axis in (0, 1))
        self._ends = [dict(pairwise((*start, side))) for start, side in zip(starts, self.size, strict=True)]

    def add(self, window: Window, pixels: Tensor) -> None:
        """Add the pixels (3, h, w) of a tile, up to where the next tiles begin."""
        corner = window[:2]
        height, width = (ends[start] - start for ends, start in zip(self._ends, corner, strict=True))
        sums, places = pixels[:, :height, :width].numpy().astype(np.uint32), []
        for axis, (start, side) in enumerate(zip(corner, (height, width), strict=True)):
            cells = np.arange(start, start + side) // self._cell
            sums = np.add.reduceat(sums, np.flatnonzero(np.diff(cells, prepend=-1)), axis=axis + 1)
            places.append(slice(cells[0], cells[-1] + 1))
        self._sums[:, places[0], places[1]] += sums

    def image(self) -> Tensor:
        """Return the image, (3, h, w) uint8."""
        from torchvision.transforms.v2 import functional

        sides = [np.diff([*range(0, side, self._cell), side]) for side in self.size]
        means = np.rint(self._sums / (sides[0][:, None] * sides[1])).astype(np.uint8)
        return functional.resize(torch.from_numpy(means), list(self._target), antialias=self.rule.antialias)


def detect_tiles(image: TiledImage, detect: Detect, threshold: float) -> ScoredBoxes:
    """Return the merged detections of an image, best first. The next batch is prepared while the model runs.

    Args:
        detect: Runs the model on resized images with their original sizes.
        threshold: Minimum score.
    """
    parts: list[ScoredBoxes] = []
    batches = image.batches()
    with ThreadPoolExecutor(1, "tiles") as pool:
        pending = pool.submit(next, batches, None)
        while (batch := pending.result()) is not None:
            pending = pool.submit(next, batches, None)
            windows, pixels = batch
            results = detect(pixels, [(window.height, window.width) for window in windows])
            parts += [place(*pair, image.size, threshold) for pair in zip(results, windows, strict=True)]
    return merge(parts, image.windows)


def place(scored: ScoredBoxes, window: Window, size: tuple[int, int], threshold: float) -> ScoredBoxes:
    """Return the detections of a window that score at least `threshold`, in pixels of the image of `size`."""
    scored = scored.select(scored.scores >= threshold)
    boxes = clip_boxes_to_image(scored.boxes[None], torch.tensor([[window.height, window.width]]))[0]
    boxes = boxes + boxes.new_tensor([window.left, window.top] * 2)
    masks = EncodedMasks(scored.masks.to_rle(size, window)) if isinstance(scored.masks, MaskLogits) else None
    return scored._replace(boxes=boxes, masks=masks)


def merge(parts: Sequence[ScoredBoxes], windows: Sequence[Window]) -> ScoredBoxes:
    """Merge the detections of an image's views, in pixels of the image; see `merge_views`. Pieces are united."""
    boxes, scores, labels, queries = (torch.cat(column) for column in list(zip(*parts, strict=True))[:4])
    views = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part.scores) for part in parts]))
    groups = merge_views(boxes.numpy(), scores.numpy(), labels.numpy(), views.numpy(), windows)
    for group in (group for group in groups if len(group) > 1):
        boxes[group[0]] = torch.cat([boxes[group, :2].amin(0), boxes[group, 2:].amax(0)])
    best = torch.tensor([group[0] for group in groups], dtype=torch.int64)
    masks = None
    if parts[0].masks is not None:
        rles = [rle for part in parts if isinstance(part.masks, EncodedMasks) for rle in part.masks.rles]
        masks = EncodedMasks(tuple(unite_masks([rles[index] for index in group]) for group in groups))
    return ScoredBoxes(boxes[best], scores[best], labels[best], queries[best], masks)
