"""Inputs that depend only on the sizes of a batch, cached for the latest sizes."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ... import ops
from ...model.geometry import get_valid_ratios, pixel_centers, proposal_anchors
from ...model.layers import resize_mask
from ...model.network import DeformableDETRNetwork


@dataclass(frozen=True)
class PositionalInputs:
    """Positions of the tokens of a batch. B is 1 if no image is padded: one row serves all of them.

    Attributes:
        spatial_shapes: (height, width) of each level's map.
        position: (B, S, C), position encoding plus level embedding.
        reference_points: (B, S, L, 2).
        valid_ratios: (B, L, 2).
        padding_mask: (B, S), True = padding. None: no padding.
        anchors: (B, S, 4) in logit space, two-stage models only.
        valid: (B, S), tokens that are valid proposals, two-stage models only.
    """

    spatial_shapes: tuple[tuple[int, int], ...]
    position: Tensor
    reference_points: Tensor
    valid_ratios: Tensor
    padding_mask: Tensor | None
    anchors: Tensor | None
    valid: Tensor | None

    @property
    def nbytes(self) -> int:
        tensors = (value for value in vars(self).values() if isinstance(value, Tensor))
        return sum(tensor.nbytes for tensor in tensors)


class PositionalInputCache(nn.Module):
    """Compute `PositionalInputs` with a model's encodings, and cache the latest `MAX_ENTRIES`, up to `MAX_BYTES`."""

    MAX_ENTRIES = 2
    MAX_BYTES = 64 << 20

    def __init__(self, model: DeformableDETRNetwork, dtype: torch.dtype) -> None:
        super().__init__()
        self.position, self.level_embedding = model.position, model.level_embedding
        self.two_stage, self.dtype = model.config.two_stage, dtype
        self._cache: dict[object, PositionalInputs] = {}

    def forward(self, canvas: tuple[int, int], shapes: ops.Shapes, padding_mask: Tensor | None) -> PositionalInputs:
        """Return the inputs of a batch with maps of `shapes` on a `canvas` (height, width). No mask: no padding."""
        shapes = tuple((int(h), int(w)) for h, w in shapes)
        sizes = None if padding_mask is None else image_sizes_of(padding_mask)
        if padding_mask is not None and sizes is None:
            return self._compute(canvas, shapes, padding_mask)
        key = canvas, shapes, sizes
        inputs = self._cache.get(key) or self._compute(canvas, shapes, padding_mask)
        entries = [item for item in self._cache.items() if item[0] != key][1 - self.MAX_ENTRIES :]
        while entries and sum(entry.nbytes for _, entry in entries) + inputs.nbytes > self.MAX_BYTES:
            del entries[0]
        self._cache = dict([*entries, (key, inputs)])  # a new one, because other threads may be reading the old one
        return inputs

    def _compute(
        self, canvas: tuple[int, int], shapes: tuple[tuple[int, int], ...], padding_mask: Tensor | None
    ) -> PositionalInputs:
        padded = padding_mask is not None
        if padding_mask is None:
            padding_mask = self.level_embedding.new_zeros(1, *canvas, dtype=torch.bool)
        masks = [resize_mask(padding_mask, shape) for shape in shapes]
        ratios = get_valid_ratios(masks, torch.float32)
        encode = self._encode_padded if padded else self._encode_unpadded
        position = torch.cat(list(map(encode, masks, self.level_embedding)), dim=1)
        token_mask = torch.cat([mask.flatten(1) for mask in masks], dim=1) if padded else None
        anchors = valid = None
        if self.two_stage:
            anchors, valid = proposal_anchors(shapes, ratios, token_mask)
        reference_points = pixel_centers(shapes, ratios)[:, :, None] * ratios[:, None]
        return PositionalInputs(shapes, position, reference_points, ratios, token_mask, anchors, valid)

    def _encode_padded(self, mask: Tensor, level: Tensor) -> Tensor:
        """Position encoding plus level embedding of one map: mask (B, H, W) → (B, H·W, C)."""
        return (self.position(mask, torch.float32).flatten(2).transpose(1, 2) + level).to(self.dtype)

    def _encode_unpadded(self, mask: Tensor, level: Tensor) -> Tensor:
        """The same for a map without padding, from one encoding per row and one per column."""
        axes = self.position.axis_encodings(*mask.shape[1:])
        parts = [(axis.to(level) + part).to(self.dtype) for axis, part in zip(axes, level.chunk(2), strict=True)]
        return torch.cat(torch.broadcast_tensors(*parts), dim=-1).flatten(0, 1)[None]


def image_sizes_of(padding_mask: Tensor) -> tuple[tuple[int, int], ...] | None:
    """(height, width) of each image of a mask (B, H, W). None: an image is not a rectangle in the upper left corner."""
    heights, widths = (~padding_mask[:, :, 0]).sum(1), (~padding_mask[:, 0, :]).sum(1)
    rows = torch.arange(padding_mask.shape[1], device=padding_mask.device)
    columns = torch.arange(padding_mask.shape[2], device=padding_mask.device)
    rectangles = (rows < heights[:, None])[:, :, None] & (columns < widths[:, None])[:, None, :]
    if not torch.equal(rectangles, ~padding_mask):
        return None
    return tuple(zip(heights.tolist(), widths.tolist(), strict=True))
