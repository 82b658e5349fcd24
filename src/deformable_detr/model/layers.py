"""Small modules that encoder, decoder and heads share."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..utils.dtype import upcast

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class Dropout(nn.Dropout):
    """nn.Dropout whose CPU mask has one byte per element and is drawn five times faster.

    Four elements share the 64 bits of one random number, so p is rounded to a multiple of 1/65536; the scale matches.
    PyTorch's own dropout takes a seventh of a training step's time there.
    """

    def mask_and_scale(self, x: Tensor) -> tuple[Tensor, float] | None:
        """Return an int8 mask like x (1 = kept) and the scale of kept elements; None if PyTorch's forward applies."""
        dropped = round(self.p * 65536)
        if not self.training or dropped in (0, 65536) or x.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64)
        bits = bits.random_(-(2**63), None).view(torch.int16)  # None, no upper bound: all 64 bits are random
        kept = bits[: x.numel()].view(x.shape) >= dropped - 32768
        return kept.view(torch.int8), 65536 / (65536 - dropped)

    def forward(self, x: Tensor) -> Tensor:
        drawn = self.mask_and_scale(x)
        return super().forward(x) if drawn is None else (x * drawn[0]).mul_(drawn[1])


class FeedForward(nn.Module):
    """Two linear layers with an activation and dropout between them: (…, C) in and out."""

    def __init__(self, dim: int, hidden: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = Dropout(dropout)
        self.linear2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear1(x)
        if isinstance(self.activation, nn.ReLU) and (drawn := self.dropout.mask_and_scale(x)) is not None:
            return self.linear2(_ReLUDropout.apply(x, *drawn))
        return self.linear2(self.dropout(self.activation(x)))


class _ReLUDropout(torch.autograd.Function):
    """ReLU and dropout that save only their output, which the next layer saves anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        y = x.relu().mul_(mask).mul_(scale)
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
    """Resize a bool mask (B, H, W) by nearest-neighbor interpolation."""
    if not torch.compiler.is_exporting():
        return F.interpolate(mask[:, None].float(), size=shape)[:, 0].bool()
    # Runtimes round the index differently; this is `interpolate`'s own arithmetic.
    for dim, size in enumerate(shape, start=1):
        old, new = (torch.scalar_tensor(n, device=mask.device) for n in (mask.shape[dim], size))
        index = (torch.arange(size, dtype=torch.float32, device=mask.device) * (old / new)).floor().minimum(old - 1)
        mask = mask.index_select(dim, index.long())
    return mask


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return the logit of x in 0..1, bounded by ±log(1 / eps), in at least fp32: half precision overflows."""
    x = upcast(x)
    return torch.log(x.clamp(eps, 1.0) / (1 - x).clamp(eps, 1.0))
