"""The forward pass in plain PyTorch, several times faster than `grid_sample` on CPUs that have no compiled library.

A query's weighted corners are one bag of rows of `value`: `F.embedding_bag` sums them without storing the samples.
Queries go in chunks, so that the tables of rows and weights stay in the cache. No gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024


def forward(value: Tensor, shapes: list[int], reference: Tensor | None, offsets: Tensor, logits: Tensor) -> Tensor:
    """As `native.library.forward`: (B, Q, M·D); fp32 arithmetic for all dtypes up to fp32."""
    B, S, M, D = value.shape
    Q, L, P = offsets.shape[1], offsets.shape[3], offsets.shape[4]
    n = L * P
    sizes = torch.tensor(shapes, dtype=torch.int64, device=value.device).view(L, 2)
    if int(sizes.prod(-1).sum()) != S:
        raise ValueError(f"deformable attention: spatial shapes {shapes} do not add up to the {S} tokens of value")
    start = (sizes.prod(-1).cumsum(0) - sizes.prod(-1)).to(torch.int32).repeat_interleave(P)
    size = sizes.flip(-1).float().repeat_interleave(P, dim=0)  # (n, 2) as (width, height)
    width = sizes[:, 1].to(torch.int32).repeat_interleave(P)
    heads = torch.arange(M, dtype=torch.int32, device=value.device)[:, None, None]
    output = value.new_empty(B, Q, M * D)
    for b in range(B):
        table = value[b].reshape(S * M, D).float()
        for q in range(0, Q, CHUNK):
            chunk = slice(q, q + CHUNK)
            x, weights = _pixels(
                None if reference is None else reference[b, chunk].float(), offsets[b, chunk].float(),
                logits[b, chunk].float().flatten(-2), size, P,
            )  # fmt: skip
            rows, factors = _corners(x, weights, size, start, width)
            count = rows.shape[0]
            rows.mul_(M).add_(heads)
            sums = F.embedding_bag(
                rows.view(count * M, 4 * n), table, mode="sum", per_sample_weights=factors.view(count * M, 4 * n)
            )
            output[b, chunk] = sums.view(count, M * D)
    return output


def _pixels(
    reference: Tensor | None, offsets: Tensor, logits: Tensor, size: Tensor, points: int
) -> tuple[Tensor, Tensor]:
    """Sampling locations (q, M, n, 2) in pixels of their level and attention weights (q, M, n) of one chunk."""
    offsets = offsets.flatten(2, 3)  # (q, M, n, 2)
    if reference is None:
        return torch.addcmul(offsets.new_full((), -0.5), offsets, size), logits
    reference = reference.repeat_interleave(points, dim=1)[:, None]  # (q, 1, n, 2 or 4)
    scale = reference[..., 2:] * size * (0.5 / points) if reference.shape[-1] == 4 else 1.0
    # Small numbers first: a place far from the origin is rounded once.
    return torch.addcmul(offsets * scale - 0.5, reference[..., :2], size), logits.softmax(-1)


def _corners(x: Tensor, weights: Tensor, size: Tensor, start: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (q, M, 4, n) around each location and their weights: outside the map a token in range, weight 0."""
    low = x.floor()
    high = low + 1
    fraction = x - low
    # A NaN compares false: its weight is 0, and nan_to_num gives it a token in range.
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
    near, far = low_weight[..., 0], high_weight[..., 0]
    return rows, torch.stack([upper * near, upper * far, lower * near, lower * far], dim=2)
