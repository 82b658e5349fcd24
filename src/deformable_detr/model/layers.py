"""The small parts that encoder, decoder and heads share."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class Dropout(nn.Dropout):
    """nn.Dropout, but on CPUs from a mask of one byte an element that is drawn five times sooner.

    PyTorch's own takes a random number an element there and keeps them all in the input's precision: a seventh of a
    training step's time. Here four elements share the 64 bits of a number, so that p is a whole number of 1/65536; the
    scale is the inverse of exactly that probability.
    """

    def drawn(self, x: Tensor) -> tuple[Tensor, float] | None:
        """Which elements of x stay (1) or go (0), int8 in its shape, and what those that stay are multiplied by.

        None: nothing goes, or `forward` is left to PyTorch.
        """
        goes = round(self.p * 65536)
        if not self.training or goes in (0, 65536) or x.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        stays = bits[: x.numel()].view(x.shape) >= goes - 32768
        return stays.view(torch.int8), 65536 / (65536 - goes)

    def forward(self, x: Tensor) -> Tensor:
        drawn = self.drawn(x)
        return super().forward(x) if drawn is None else (x * drawn[0]).mul_(drawn[1])


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, (…, C) in and out."""

    def __init__(self, dim: int, hidden: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = Dropout(dropout)
        self.linear2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear1(x)
        if isinstance(self.activation, nn.ReLU) and (drawn := self.dropout.drawn(x)) is not None:
            return self.linear2(_DroppedReLU.apply(x, *drawn))
        return self.linear2(self.dropout(self.activation(x)))


class _DroppedReLU(torch.autograd.Function):
    """ReLU, then dropout. Keeps its output alone, which the next layer keeps anyway: where that is over 0, gradients
    pass. These are the largest tensors of a training step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, stays: Tensor, scale: float) -> Tensor:
        y = x.relu().mul_(stays).mul_(scale)
        ctx.save_for_backward(y)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad, y, 0).mul_(ctx.scale), None, None


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


def resize_mask(mask: Tensor, shape: tuple[int, int]) -> Tensor:
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
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.log(x.clamp(eps, 1.0) / (1 - x).clamp(eps, 1.0))
