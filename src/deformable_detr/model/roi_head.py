"""The RoI head: a last refinement of classes and boxes, which looks at a grid of points in each predicted box.

The decoder's queries read a few points of maps at strides 8 to 64. This head reads G × G points of the backbone's
stride-4 map, spread evenly over the box (RoIAlign; Mask R-CNN, section 3), as a two-stage detector does.
"""

import torch
from torch import Tensor, nn

from .. import ops
from ..config.schema import ModelConfig
from .layers import MLP

CHANNELS = 48  # of the map that the grid reads
STEP = 0.2  # of a box's size that a delta of 1 moves it; R-CNN divides its targets by 0.1 and 0.2
MAX_LOG_SCALE = 4.0


class RoIHead(nn.Module):
    """Add what a query's box contains to the query (B, Q, C)."""

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        C = config.hidden_dim
        self.grid = config.roi_grid
        self.lateral = nn.Linear(channels, CHANNELS)
        self.mlp = MLP(CHANNELS * self.grid**2, 2 * C, C, layers=2)
        self.norm = nn.LayerNorm(C)

    def forward(
        self, stride4: Tensor, padding_mask: Tensor | None, queries: Tensor, boxes: Tensor, valid_ratios: Tensor
    ) -> Tensor:
        """Return the queries (B, Q, C) from which the heads predict.

        Args:
            stride4: (B, channels, h, w), the backbone's map.
            padding_mask: (B, h, w) bool, True = padding.
            queries: (B, Q, C), the normed output of the last decoder layer.
            boxes: (B, Q, 4) (cx, cy, w, h) in 0..1 of the image; they get no gradient.
            valid_ratios: (B, 2), the unpadded part (width, height) of the map.
        """
        value = self.lateral(stride4.permute(0, 2, 3, 1).contiguous())
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0.0)
        locations = grid_points(boxes.detach(), self.grid) * valid_ratios[:, None, None]
        return self.norm(queries + self.mlp(sample(value, locations).to(queries.dtype)))


def refine_in_box(deltas: Tensor, boxes: Tensor) -> Tensor:
    """Move and scale boxes (…, 4) cxcywh in 0..1 by deltas (…, 4) relative to their size, as R-CNN does (appendix C).

    The grid is relative to the box too, so that small and large boxes need the same deltas. In logit space, as in the
    decoder, the same delta moves a small box by many times its size.
    """
    sizes = boxes[..., 2:]
    centers = boxes[..., :2] + STEP * deltas[..., :2] * sizes
    sizes = sizes * (2 * STEP * deltas[..., 2:]).clamp(max=MAX_LOG_SCALE).exp()
    return torch.cat([centers, sizes], dim=-1).clamp(0, 1)


def grid_points(boxes: Tensor, grid: int) -> Tensor:
    """Return the centers (B, Q, G², 2), row by row, of the cells of a G × G grid in boxes (B, Q, 4) cxcywh."""
    steps = (torch.arange(grid, device=boxes.device, dtype=boxes.dtype) + 0.5) / grid - 0.5
    cells = torch.stack([steps.expand(grid, -1), steps[:, None].expand(-1, grid)], dim=-1).flatten(0, 1)
    return boxes[:, :, None, :2] + boxes[:, :, None, 2:] * cells


def sample(value: Tensor, locations: Tensor) -> Tensor:
    """Return the values (B, Q, G² · D) of a map (B, h, w, D) at locations (B, Q, G², 2), (x, y) in 0..1 of it."""
    B, h, w, D = value.shape
    points = locations.flatten(1, 2)[:, :, None, None, None]  # the op has one query per point, with one head and level
    weights = torch.ones_like(points[..., 0])
    sampled = ops.sample_and_sum(value.reshape(B, h * w, 1, D), [(h, w)], points, weights)
    return sampled.reshape(*locations.shape[:2], -1)
