"""Multi-scale deformable attention as a module (section 4.1, equation 3)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops


class SamplingDetails(NamedTuple):
    """Where one layer sampled the memory.

    locations: (B, Q, M, L, P, 2), (x, y) in 0..1 of the padded maps.
    weights: (B, Q, M, L, P), which sum to 1 over L × P.
    """

    locations: Tensor
    weights: Tensor


class DeformableAttention(nn.Module):
    """Attention in which each query reads P points per head and level around its reference point.

    Args:
        dim: C, a multiple of `heads`.
        heads: M.
        levels: L.
        points: P.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)

    def reset_parameters(self) -> None:
        """Start as rings: head m samples in direction 2π·m/M, point p at distance p + 1 (appendix A.4)."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)  # onto the unit square
        distances = torch.arange(1, self.points + 1)
        rings = directions[:, None, None, :] * distances[:, None]  # (M, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(rings.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        queries: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        spatial_shapes: ops.Shapes,
        padding_mask: Tensor | None = None,
        return_attention: bool = False,
    ) -> tuple[Tensor, SamplingDetails | None]:
        """Attend to the memory.

        Args:
            queries: (B, Q, C), content plus position.
            reference_points: (B, Q, L, 2) points or (B, Q, L, 4) boxes in 0..1 of the padded maps, fp32.
            memory: (B, S, C).
            spatial_shapes: (height, width) per level.
            padding_mask: (B, S) bool; padding reads as zero. Default: no padding.
            return_attention: Also return the sampling locations and weights.

        Returns:
            (B, Q, C), and `SamplingDetails` or None.
        """
        B, Q, _ = queries.shape
        M, L, P = self.heads, self.levels, self.points
        value = self.value_proj(memory)
        if padding_mask is not None:
            value = value.masked_fill_(padding_mask[..., None], 0.0)
        value = value.unflatten(-1, (M, -1))
        offsets = self.sampling_offsets(queries).view(B, Q, M, L, P, 2).to(reference_points.dtype)
        logits = self.attention_weights(queries).view(B, Q, M, L, P).to(reference_points.dtype)
        out = ops.deformable_attention(value, spatial_shapes, reference_points, offsets, logits)
        details = None
        if return_attention:
            locations = ops.sampling_locations(spatial_shapes, reference_points, offsets)
            details = SamplingDetails(locations, logits.flatten(-2).softmax(-1).view_as(logits))
        return self.output_proj(out), details
