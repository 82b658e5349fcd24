"""A model without what only training needs: batch norms merged into convolutions, heads that nobody reads left out."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ...config.image_size import typical_input_size

if TYPE_CHECKING:
    from ...config.schema import ModelConfig
    from ...model.network import N


def stripped(model: N, device: torch.device | str | None = None) -> N:
    """A copy in evaluation mode and fp32, without gradients, batch norms and class heads of intermediate layers.

    device: where the copy is to be; none: where the model is. The model itself is not changed.
    """
    model = copy.deepcopy(model).float().eval().requires_grad_(False)
    if device is not None:
        model = model.to(device)
    body = model.backbone.body
    with torch.no_grad():
        fold_batch_norms(body, example(body, model.config, model.get_buffer("pixel_mean"), (64, 64)))
    classes = model.decoder.heads.classes
    if len(classes) > 1:  # only the last layer's classes (and the proposals') are read: the rest go
        for layer in range(model.config.decoder_layers - 1):
            classes[layer] = classes[model.config.decoder_layers - 1]
    return model


def example(body: nn.Module, config: ModelConfig, like: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels (1, 3, height, width) of noise that the backbone takes: of `size`, or where that is too small, or not of
    its windows, as images of the config's size have them.
    """
    image = typical_input_size(config)
    generator = torch.Generator().manual_seed(0)
    for height, width in (size, image):
        pixels = torch.randn(1, 3, height, width, generator=generator).to(like)
        try:
            with torch.no_grad():
                body(pixels)
        except (RuntimeError, AssertionError):
            if (height, width) == image:
                raise
        else:
            break
    return pixels


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
        maps = body(pixels)
    for hook in hooks:
        hook.remove()
    # A map that is taken between a convolution and its norm (xception41p) is to stay as it is.
    taken = {made[id(x)] for x in maps if id(x) in made}

    folded = 0
    for name, norm in [item for item in body.named_modules() if item[1] in pairs]:
        convolution = pairs[norm]
        if runs[norm] > 1 or runs[convolution] > 1 or convolution in taken:
            continue
        values: Any = norm
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, values.running_mean, values.running_var, values.eps,
            values.weight, values.bias,
        )  # fmt: skip
        # timm's norms have the activation in them.
        replace_module(body, name, getattr(norm, "act", None) or nn.Identity())
        folded += 1
    return folded


def _plain_convolution(module: nn.Module) -> bool:
    from timm.layers.conv2d_same import Conv2dSame

    return type(module) in (nn.Conv2d, Conv2dSame)


def _is_batch_norm(module: nn.Module) -> bool:
    """nn.BatchNorm2d, timm's with an activation, and the frozen forms of both."""
    return "Batch" in type(module).__name__ and all(
        hasattr(module, name) for name in ("running_mean", "running_var", "weight", "bias", "eps")
    )


def replace_module(body: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the one called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(body.get_submodule(parent), leaf, module)
