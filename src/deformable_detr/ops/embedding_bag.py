"""The forward pass in plain PyTorch, several times faster than `grid_sample` on CPUs without the compiled library.

A query's weighted corner pixels are one bag of rows of `value`, which `F.embedding_bag` sums without storing samples.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import OpInputs

CHUNK = 1024  # queries whose tables of rows and weights stay in the cache


def forward(inputs: OpInputs) -> Tensor:
    """Like `native.library.forward`, with fp32 arithmetic for every dtype."""
    value, shapes, reference_points, offsets, logits = inputs
    B, S, M, D = value.shape
    Q, L, P = offsets.shape[1], offsets.shape[3], offsets.shape[4]
    n = L * P
    sizes = torch.tensor(shapes, dtype=torch.int64, device=value.device).view(L, 2)
    start = (sizes.prod(-1).cumsum(0) - sizes.prod(-1)).to(torch.int32).repeat_interleave(P)
    size = sizes.flip(-1).float().repeat_interleave(P, dim=0)  # (n, 2) as (width, height)
    width = sizes[:, 1].to(torch.int32).repeat_interleave(P)
    heads = torch.arange(M, dtype=torch.int32, device=value.device)[:, None, None]
    output = value.new_empty(B, Q, M * D)
    for b in range(B):
        table = value[b].reshape(S * M, D).float()
        for q in range(0, Q, CHUNK):
            chunk = slice(q, q + CHUNK)
            points = None if reference_points is None else reference_points[b, chunk].float()
            chunk_logits = logits[b, chunk].float().flatten(-2)
            pixels, weights = _samples(points, offsets[b, chunk].float(), chunk_logits, size, P)
            rows, factors = _corners(pixels, weights, size, start, width)
            count = rows.shape[0]
            rows.mul_(M).add_(heads)
            sums = F.embedding_bag(
                rows.view(count * M, 4 * n), table, mode="sum", per_sample_weights=factors.view(count * M, 4 * n)
            )
            output[b, chunk] = sums.view(count, M * D)
    return output


def _samples(points: Tensor | None, offsets: Tensor, logits: Tensor, size: Tensor, P: int) -> tuple[Tensor, Tensor]:
    """Sampling locations (q, M, n, 2) in pixels of their level and attention weights (q, M, n) of one chunk."""
    offsets = offsets.flatten(2, 3)  # (q, M, n, 2)
    if points is None:
        return torch.addcmul(offsets.new_full((), -0.5), offsets, size), logits
    points = points.repeat_interleave(P, dim=1)[:, None]  # (q, 1, n, 2 or 4)
    scale = points[..., 2:] * size * (0.5 / P) if points.shape[-1] == 4 else 1.0
    # Small numbers first, so that a location far from the origin is rounded once.
    return torch.addcmul(offsets * scale - 0.5, points[..., :2], size), logits.softmax(-1)


def _corners(pixels: Tensor, weights: Tensor, size: Tensor, start: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (q, M, 4, n) around each location and their weights; outside the map any token with weight 0."""
    low = pixels.floor()
    high = low + 1
    fraction = pixels - low
    # NaN compares false, so its weight is 0; nan_to_num makes its token valid.
    high_weight = torch.where(high.ge(0) & high.lt(size), fraction, 0.0)
    low_weight = torch.where(low.ge(0) & low.lt(size), 1 - fraction, 0.0)
    last = size - 1
    low = torch.minimum(low.nan_to_num_(0.0).clamp_min_(0), last).to(torch.int32)
    high = torch.minimum(high.nan_to_num_(0.0).clamp_min_(0), last).to(torch.int32)
    left, right = low[..., 0], high[..., 0]
    top = torch.addcmul(start, low[..., 1], width)
    bottom = torch.addcmul(start, high[..., 1], width)
    rows = torch.stack([top + left, top + right, bottom + left, bottom + right], dim=2)
    upper, lower = low_weight[..., 1] * weights, high_weight[..., 1] * weights
    left_weight, right_weight = low_weight[..., 0], high_weight[..., 0]
    return rows, torch.stack(
        [upper * left_weight, upper * right_weight, lower * left_weight, lower * right_weight], dim=2
    )
