"""A backbone made ready for a graph with its sizes left open."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtimes.fused.folding import replace_module


def open_same_padding(body: nn.Module) -> None:
    """Puts `SameConvolution` in place of timm's, which asks for the sizes, in place."""
    from timm.layers.conv2d_same import Conv2dSame

    for name, module in list(body.named_modules()):
        if isinstance(module, Conv2dSame):
            replace_module(body, name, SameConvolution(cast(nn.Conv2d, module)))


class SameConvolution(nn.Module):
    """TensorFlow's "same" padding, ceil(size / stride) pixels out, for sizes that a graph leaves open."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.stride, self.dilation, self.groups = convolution.stride, convolution.dilation, convolution.groups

    def forward(self, x: Tensor) -> Tensor:
        pads: list[Any] = []  # numbers, open ones in a graph
        for dim in (3, 2):  # F.pad counts from the last dimension
            size, stride = x.shape[dim], self.stride[dim - 2]
            reach = self.dilation[dim - 2] * (self.weight.shape[dim] - 1) + 1
            # Of the equal forms, the one that nests to (size - 1) // 4 + 1 and so on: with (size + 1) // 2 the exporter
            # carries expressions of half a page for each tensor, and a .pt2 takes minutes to load.
            total = (size - 1) // stride * stride + reach - size
            if reach < stride:
                total = torch.sym_max(total, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
