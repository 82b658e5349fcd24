"""Multi-scale deformable attention in plain PyTorch: the maths that every faster backend must equal.

B images, S tokens of all levels, Q queries, M heads, D channels a head, L levels, P points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = Sequence[tuple[int, int]]


def sampling_locations(spatial_shapes: Shapes, reference_points: Tensor, sampling_offsets: Tensor) -> Tensor:
    """Where each query looks, (B, Q, M, L, P, 2) as (x, y) in 0..1 of each level's map.

    reference_points: (B, Q, L, 2) points, offsets then count in pixels of the level (equation 3), or (B, Q, L, 4)
    boxes (cx, cy, w, h), offsets then count in halves of the box, spread over the points (appendix A.4).
    sampling_offsets: (B, Q, M, L, P, 2).
    """
    points = sampling_offsets.shape[-2]
    reference = reference_points[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 or 4)
    if reference_points.shape[-1] == 2:
        return reference + sampling_offsets / map_sizes(spatial_shapes, reference)[:, None]
    return reference[..., :2] + sampling_offsets / points * reference[..., 2:] * 0.5


def map_sizes(spatial_shapes: Shapes, like: Tensor) -> Tensor:
    """(width, height) of each level, (L, 2); in an exported graph they follow the input's size."""
    if torch.compiler.is_exporting():
        sides = [
            torch.stack([torch.scalar_tensor(side, dtype=like.dtype) for side in (w, h)]) for h, w in spatial_shapes
        ]
        return torch.stack(sides).to(like.device)
    return torch.tensor([(w, h) for h, w in spatial_shapes], dtype=like.dtype, device=like.device)


def sampling_grid(locations: Tensor) -> Tensor:
    """Locations as `grid_sample` counts them, -1..1; far away or not a number becomes a place just outside the map."""
    return locations.nan_to_num(-1.0).clamp(-1.0, 2.0) * 2 - 1


def sample_and_sum(
    value: Tensor, spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Bilinear samples of `value` at the locations, summed by the weights (equation 3): (B, Q, M·D).

    value: (B, S, M, D), tokens of all levels in the order of `spatial_shapes`, each row by row.
    sampling_locations: (B, Q, M, L, P, 2), (x, y) in 0..1; outside there is zero.
    attention_weights: (B, Q, M, L, P).
    """
    dtype = value.dtype
    # Half precision would lose up to half a pixel of a location: values rise to the locations' precision instead.
    value = value.to(sampling_locations.dtype)
    B, _, M, D = value.shape
    Q, P = sampling_locations.shape[1], sampling_locations.shape[4]
    grids = sampling_grid(sampling_locations).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B·M, Q, P, 2)
    weights = attention_weights.permute(3, 0, 2, 1, 4).reshape(len(spatial_shapes), B * M, 1, Q, P)
    maps = value.split([h * w for h, w in spatial_shapes], dim=1)
    total = value.new_zeros(B * M, D, Q)
    for (h, w), pixels, grid, weight in zip(spatial_shapes, maps, grids, weights, strict=True):
        pixels = pixels.permute(0, 2, 3, 1).reshape(B * M, D, h, w)
        samples = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        total = total + (samples * weight).sum(-1)
    return total.view(B, M * D, Q).transpose(1, 2).to(dtype)


def deformable_attention(
    value: Tensor,
    spatial_shapes: Shapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    sample: Callable[[Tensor, Shapes, Tensor, Tensor], Tensor] = sample_and_sum,
) -> Tensor:
    """`sample_and_sum` at the locations that references and offsets give, with weights from a softmax over L × P.

    sample: another way to compute `sample_and_sum`.
    """
    locations = sampling_locations(spatial_shapes, reference_points, sampling_offsets)
    weights = attention_logits.to(locations.dtype).flatten(-2).softmax(-1).view_as(attention_logits)
    return sample(value, spatial_shapes, locations, weights)
