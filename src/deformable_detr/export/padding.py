"""TensorFlow's "same" padding in a form that can be traced with dynamic sizes."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def use_dynamic_same_padding(body: nn.Module) -> None:
    """Replace timm's `Conv2dSame`, whose code computes with the input size, by `DynamicSameConv2d`, in place."""
    from timm.layers.conv2d_same import Conv2dSame

    for name, module in list(body.named_modules()):
        if isinstance(module, Conv2dSame):
            body.set_submodule(name, DynamicSameConv2d(cast(nn.Conv2d, module)))


class DynamicSameConv2d(nn.Module):
    """A convolution with "same" padding: ceil(size / stride) output pixels."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.stride, self.dilation, self.groups = convolution.stride, convolution.dilation, convolution.groups

    def forward(self, x: Tensor) -> Tensor:
        padding: list[Any] = []  # numbers, symbolic while tracing
        for dim in (3, 2):  # F.pad starts with the last dimension
            size, stride = x.shape[dim], self.stride[dim - 2]
            extent = self.dilation[dim - 2] * (self.weight.shape[dim] - 1) + 1
            # This form nests to (size - 1) // 4 + 1 and so on. With (size + 1) // 2 the expressions of the exporter
            # grow to half a page per tensor, and a .pt2 file takes minutes to load.
            total = (size - 1) // stride * stride + extent - size
            if extent < stride:
                total = torch.sym_max(total, 0)
            padding += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, padding), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
