"""Multi-scale deformable attention in plain PyTorch: the definition that every faster backend must equal."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = Sequence[tuple[int, int]]  # (height, width) per level


class OpInputs(NamedTuple):
    """The arguments of every faster backend. `operators.check` has validated their shapes.

    For `deformable_attention`, `offsets` and `logits` are sampling offsets and attention logits. For `sample_and_sum`,
    they are sampling locations in 0..1 and attention weights, and `reference_points` is None.

    value: (B, S, M, D).
    shapes: height, width, height, width, … of all levels.
    reference_points: (B, Q, L, 2 or 4), or None.
    offsets: (B, Q, M, L, P, 2).
    logits: (B, Q, M, L, P).
    """

    value: Tensor
    shapes: list[int]
    reference_points: Tensor | None
    offsets: Tensor
    logits: Tensor

    @property
    def spatial_shapes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) per level."""
        return tuple(zip(self.shapes[::2], self.shapes[1::2], strict=True))


def deformable_attention(
    value: Tensor,
    spatial_shapes: Shapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    sample: Callable[[Tensor, Shapes, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Compute equation 3; arguments as for `dispatch.deformable_attention`.

    sample: Computes `sample_and_sum`. Default: the one of this module.
    """
    locations = sampling_locations(spatial_shapes, reference_points, sampling_offsets)
    weights = attention_logits.to(locations.dtype).flatten(-2).softmax(-1).view_as(attention_logits)
    return (sample or sample_and_sum)(value, spatial_shapes, locations, weights)


def sampling_locations(spatial_shapes: Shapes, reference_points: Tensor, sampling_offsets: Tensor) -> Tensor:
    """Return where each query samples, (B, Q, M, L, P, 2) as (x, y) in 0..1 of each level's map.

    Args:
        spatial_shapes: (height, width) per level.
        reference_points: (B, Q, L, 2) points; offsets are then in pixels of the level (equation 3). Or (B, Q, L, 4)
            boxes (cx, cy, w, h); the location is center + offset / P · size / 2 (appendix A.4).
        sampling_offsets: (B, Q, M, L, P, 2).
    """
    P = sampling_offsets.shape[-2]
    reference = widened(reference_points)[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 or 4)
    if reference_points.shape[-1] == 2:
        return reference + sampling_offsets / map_sizes(spatial_shapes, reference)[:, None]
    return reference[..., :2] + reference[..., 2:] * (0.5 / P) * sampling_offsets


def widened(locations: Tensor) -> Tensor:
    """Return locations in 0..1 at least in fp32: others would move by up to half a pixel."""
    return locations.to(torch.promote_types(locations.dtype, torch.float32))


def sample_and_sum(value: Tensor, spatial_shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sum bilinear samples by the weights; arguments as for `dispatch.sample_and_sum`."""
    dtype = value.dtype
    # In the locations' precision: half precision would move a location by up to half a pixel.
    value = value.to(locations.dtype)
    B, _, M, D = value.shape
    Q, P = locations.shape[1], locations.shape[4]
    grids = sampling_grid(locations).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B·M, Q, P, 2)
    weights = weights.permute(3, 0, 2, 1, 4).reshape(len(spatial_shapes), B * M, 1, Q, P)
    maps = value.split([h * w for h, w in spatial_shapes], dim=1)
    total = value.new_zeros(B * M, D, Q)
    for (h, w), pixels, grid, weight in zip(spatial_shapes, maps, grids, weights, strict=True):
        pixels = pixels.permute(0, 2, 3, 1).reshape(B * M, D, h, w)
        samples = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        total = total + (samples * weight).sum(-1)  # (B·M, D, Q, P) summed over P
    return total.view(B, M * D, Q).transpose(1, 2).to(dtype)


def sampling_grid(locations: Tensor) -> Tensor:
    """Convert locations in 0..1 to `grid_sample`'s −1..1.

    NaN becomes −1; other locations are clamped to −1..2. Samples at −1 and at 2 are zero for any map size.
    """
    return locations.nan_to_num(-1.0).clamp(-1.0, 2.0) * 2 - 1


def map_sizes(spatial_shapes: Shapes, like: Tensor) -> Tensor:
    """Return (width, height) per level, (L, 2), as a function of the input's size in an exported graph."""
    if torch.compiler.is_exporting():
        sides = [
            torch.stack([torch.scalar_tensor(side, dtype=like.dtype) for side in (w, h)]) for h, w in spatial_shapes
        ]
        return torch.stack(sides).to(like.device)
    return torch.tensor([(w, h) for h, w in spatial_shapes], dtype=like.dtype, device=like.device)
