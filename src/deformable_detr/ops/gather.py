"""Bilinear sampling by `index_select`, for exported graphs whose runtime has no exact `grid_sample`."""

import torch
from torch import Tensor

from .reference import Shapes, map_sizes


def sample_and_sum(value: Tensor, spatial_shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Equal `reference.sample_and_sum`, slower in PyTorch."""
    dtype = value.dtype
    value = value.to(locations.dtype)
    B, S, M, D = value.shape
    Q, P = locations.shape[1], locations.shape[4]
    rows = value.transpose(1, 2).reshape(B * M * S, D)
    locations = locations.permute(0, 2, 1, 3, 4, 5).reshape(B * M, Q, len(spatial_shapes), P, 2)
    weights = weights.to(value.dtype).permute(0, 2, 1, 3, 4).reshape(B * M, Q, len(spatial_shapes), P)
    sizes = map_sizes(spatial_shapes, value)  # (L, 2)
    first = torch.arange(B * M, device=value.device)[:, None, None] * S  # row of each map's first pixel
    total = value.new_zeros(B * M, Q, D)
    for level, (h, w) in enumerate(spatial_shapes):
        size = sizes[level]
        # Far and NaN locations become ones just outside the map.
        pixels = locations[:, :, level].nan_to_num(-1.0).clamp(-1.0, 2.0) * size - 0.5  # (B·M, Q, P, 2)
        corner = pixels.floor()
        fraction = pixels - corner
        for dy in (0, 1):
            for dx in (0, 1):
                pixel = corner + torch.tensor((dx, dy), dtype=corner.dtype, device=corner.device)
                inside = ((pixel >= 0) & (pixel < size)).all(-1)
                share = (fraction[..., 0] if dx else 1 - fraction[..., 0]) * (
                    fraction[..., 1] if dy else 1 - fraction[..., 1]
                )
                weight = (weights[:, :, level] * share).masked_fill(~inside, 0.0)
                x, y = pixel.clamp(min=0.0).minimum(size - 1).long().unbind(-1)
                index = first + y * w + x
                samples = rows.index_select(0, index.reshape(-1)).view(B * M, Q, P, D)
                total = total + (samples * weight[..., None]).sum(2)
        first = first + h * w
    return total.view(B, M, Q, D).transpose(1, 2).reshape(B, Q, M * D).to(dtype)
