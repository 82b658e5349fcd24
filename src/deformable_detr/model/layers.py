"""The small parts that encoder, decoder and heads share."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, (…, C) in and out."""

    def __init__(self, dim: int, hidden: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class MLP(nn.Module):
    """`layers` linear layers with ReLU between them."""

    def __init__(self, dim: int, hidden: int, out: int, layers: int) -> None:
        super().__init__()
        sizes = [dim] + [hidden] * (layers - 1) + [out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def nearest(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """A mask (B, H, W) at another size (h, w), each pixel from the nearest above and left of it."""
    if not torch.compiler.is_exporting():
        return F.interpolate(mask[:, None].float(), size=shape)[:, 0].bool()
    # Runtimes round differently where pixels fall on one another: in a graph, the sum that `interpolate` does.
    for dim, size in enumerate(shape, start=1):
        old, new = (torch.scalar_tensor(n, device=mask.device) for n in (mask.shape[dim], size))
        index = (torch.arange(size, dtype=torch.float32, device=mask.device) * (old / new)).floor().minimum(old - 1)
        mask = mask.index_select(dim, index.long())
    return mask


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """The logit of x in 0..1, bounded by ±log(1 / eps); in fp32 at least, since half precision overflows."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
