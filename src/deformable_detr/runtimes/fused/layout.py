"""What follows from the sizes of a batch alone: computed once for each, and kept for a few of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...model.geometry import get_valid_ratios, level_masks, pixel_centers, proposal_anchors

if TYPE_CHECKING:
    from ...model.network import DeformableDETRNetwork

Sizes = tuple[tuple[int, int], ...]  # (height, width) of each image on its canvas


@dataclass(frozen=True)
class PositionalInputs:
    """Where the tokens of a batch lie. One row serves all images where none of them is padded (B is 1 then).

    position: (B, S, C), position plus level encoding. references: (B, S, L, 2). valid_ratios: (B, L, 2).
    mask: (B, S), True = padding; none where there is none.
    anchors: (B, S, 4) in logit space and usable: (B, S), two-stage only.
    """

    spatial_shapes: tuple[tuple[int, int], ...]
    position: Tensor
    references: Tensor
    valid_ratios: Tensor
    mask: Tensor | None
    anchors: Tensor | None
    usable: Tensor | None

    @property
    def bytes(self) -> int:
        tensors = (self.position, self.references, self.valid_ratios, self.mask, self.anchors, self.usable)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class Layouts(nn.Module):
    """Layouts by the sizes of a batch: the latest ones are kept, `MOST` at most and `BYTES` in all.

    model: gives the encodings.
    """

    MOST = 2
    BYTES = 64 << 20

    def __init__(self, model: DeformableDETRNetwork, dtype: torch.dtype) -> None:
        super().__init__()
        self.position, self.level_embedding = model.position, model.level_embedding
        self.two_stage, self.dtype = model.config.two_stage, dtype
        self._kept: OrderedDict[object, PositionalInputs] = OrderedDict()
        self._lock = Lock()

    def forward(self, canvas: tuple[int, int], shapes: ops.Shapes, padding_mask: Tensor | None) -> PositionalInputs:
        """The layout of a batch on a canvas (height, width) whose maps have `shapes`.

        padding_mask: (B, H, W) of a batch with padding, else none.
        """
        shapes = tuple((int(h), int(w)) for h, w in shapes)
        if padding_mask is None:
            blank = self.level_embedding.new_zeros(1, *canvas, dtype=torch.bool)
            return self._cached((canvas, shapes), lambda: self._made(blank, shapes, padded=False))
        sizes = sizes_of(padding_mask)
        if sizes is None:
            return self._made(padding_mask, shapes, padded=True)
        return self._cached((canvas, shapes, sizes), lambda: self._made(padding_mask, shapes, padded=True))

    def _cached(self, key: object, make: Callable[[], PositionalInputs]) -> PositionalInputs:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = make()
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > 1 and (
                len(self._kept) > self.MOST or sum(layout.bytes for layout in self._kept.values()) > self.BYTES
            ):
                self._kept.popitem(last=False)
        return made

    def _made(self, padding_mask: Tensor, shapes: tuple[tuple[int, int], ...], padded: bool) -> PositionalInputs:
        masks = level_masks(padding_mask, shapes)
        ratios = get_valid_ratios(masks, torch.float32)
        encode = self._encoded if padded else self._encoded_whole
        position = torch.cat(list(map(encode, masks, self.level_embedding)), dim=1)
        mask = torch.cat([mask.flatten(1) for mask in masks], dim=1) if padded else None
        anchors = usable = None
        if self.two_stage:
            anchors, usable = proposal_anchors(shapes, ratios, mask)
        references = pixel_centers(shapes, ratios)[:, :, None] * ratios[:, None]
        return PositionalInputs(shapes, position, references, ratios, mask, anchors, usable)

    def _encoded(self, mask: Tensor, level: Tensor) -> Tensor:
        """Position plus level encoding of a map, (B, H, W) mask → (B, H · W, C)."""
        return (self.position(mask, torch.float32).flatten(2).transpose(1, 2) + level).to(self.dtype)

    def _encoded_whole(self, mask: Tensor, level: Tensor) -> Tensor:
        """The same for a map without padding, where rows and columns are encoded each for themselves."""
        halves = self.position.halves(*mask.shape[1:])
        parts = [(half.to(level) + own).to(self.dtype) for half, own in zip(halves, level.chunk(2), strict=True)]
        return torch.cat(torch.broadcast_tensors(*parts), dim=-1).flatten(0, 1)[None]

    def __deepcopy__(self, memo: object) -> Layouts:
        raise TypeError("an optimized model is not copied; optimize the model again")


def sizes_of(padding_mask: Tensor) -> Sizes | None:
    """(height, width) of each image, from a mask (B, H, W) with each of them in its upper left corner; else none."""
    heights, widths = (~padding_mask[:, :, 0]).sum(1), (~padding_mask[:, 0, :]).sum(1)
    rows = torch.arange(padding_mask.shape[1], device=padding_mask.device)
    columns = torch.arange(padding_mask.shape[2], device=padding_mask.device)
    filled = (rows < heights[:, None])[:, :, None] & (columns < widths[:, None])[:, None, :]
    if not torch.equal(filled, ~padding_mask):
        return None
    return tuple(zip(heights.tolist(), widths.tolist(), strict=True))


def padded_to(pixels: Tensor, padding_mask: Tensor | None, bucket: int) -> tuple[Tensor, Tensor | None]:
    """Pixels and mask on a canvas whose sides are multiples of `bucket`."""
    height, width = pixels.shape[2:]
    below, beside = -height % bucket, -width % bucket
    if not (below or beside):
        return pixels, padding_mask
    if padding_mask is None:
        padding_mask = pixels.new_zeros(len(pixels), height, width, dtype=torch.bool)
    pixels = F.pad(pixels, (0, beside, 0, below))
    return pixels, F.pad(padding_mask, (0, beside, 0, below), value=True)
