"""A backbone made ready for a graph: batch norms merged into their convolutions, sizes left open."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


def fold_batch_norms(body: nn.Module, pixels: Tensor) -> int:
    """Merges every batch norm, trained or frozen, that directly follows a convolution into it, in place.

    body: in evaluation mode; pixels: any input of it, (B, 3, H, W), which shows what follows what.
    Returns how many were merged. Modules that run more than once and convolutions with computed weights stay.
    """
    made: dict[int, nn.Conv2d] = {}
    alive: list[Tensor] = []  # so that no two outputs have the same id
    runs: Counter[nn.Module] = Counter()
    pairs: dict[nn.Module, nn.Conv2d] = {}

    def after_convolution(module: Any, _: Any, output: Tensor) -> None:
        runs[module] += 1
        made[id(output)] = module
        alive.append(output)

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        runs[module] += 1
        if id(inputs[0]) in made:
            pairs[module] = made[id(inputs[0])]

    hooks = []
    for module in body.modules():
        if _plain_convolution(module):
            hooks.append(module.register_forward_hook(after_convolution))
        elif _is_batch_norm(module):
            hooks.append(module.register_forward_pre_hook(before_norm))
    with torch.no_grad():
        body(pixels)
    for hook in hooks:
        hook.remove()

    folded = 0
    for name, norm in [item for item in body.named_modules() if item[1] in pairs]:
        convolution = pairs[norm]
        if runs[norm] > 1 or runs[convolution] > 1:
            continue
        values: Any = norm
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, values.running_mean, values.running_var, values.eps,
            values.weight, values.bias,
        )  # fmt: skip
        # timm's norms have the activation in them.
        _replace(body, name, getattr(norm, "act", None) or nn.Identity())
        folded += 1
    return folded


def open_same_padding(body: nn.Module) -> None:
    """Puts `SameConvolution` in place of timm's, which asks for the sizes, in place."""
    from timm.layers.conv2d_same import Conv2dSame

    for name, module in list(body.named_modules()):
        if isinstance(module, Conv2dSame):
            _replace(body, name, SameConvolution(cast(nn.Conv2d, module)))


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
            total = (size + stride - 1) // stride * stride - stride + reach - size
            if reach < stride:
                total = torch.sym_max(total, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _plain_convolution(module: nn.Module) -> bool:
    from timm.layers.conv2d_same import Conv2dSame

    return type(module) in (nn.Conv2d, Conv2dSame)


def _is_batch_norm(module: nn.Module) -> bool:
    """nn.BatchNorm2d, timm's with an activation, and the frozen forms of both."""
    return "Batch" in type(module).__name__ and all(
        hasattr(module, name) for name in ("running_mean", "running_var", "weight", "bias", "eps")
    )


def _replace(body: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(body.get_submodule(parent), leaf, module)
