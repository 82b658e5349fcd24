"""A copy of the network without its training-only parts: batch norms folded, unused class heads removed."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ...config.image_size import typical_input_size
from ...config.schema import ModelConfig
from ...model.network import NetworkT
from .onednn import is_convolution


def inference_copy(model: NetworkT) -> NetworkT:
    """Copy a model for inference: evaluation mode, fp32, without gradients, batch norms or intermediate class heads."""
    model = copy.deepcopy(model).float().eval().requires_grad_(False)
    body = model.backbone.body
    with torch.no_grad():
        fold_batch_norms(body, example_pixels(body, model.config, model.get_buffer("pixel_mean"), (64, 64)))
    classes = model.decoder.heads.classes
    if len(classes) > 1:  # inference reads the classes of the last layer and of the proposals only
        for layer in range(model.config.decoder_layers - 1):
            classes[layer] = classes[model.config.decoder_layers - 1]
    return model


def example_pixels(body: nn.Module, config: ModelConfig, like: Tensor, size: tuple[int, int]) -> Tensor:
    """Return noise (1, 3, height, width) of `size`, or of the config's typical size if the backbone rejects that."""
    usual = typical_input_size(config.resize_rule)
    generator = torch.Generator().manual_seed(0)
    for height, width in (size, usual):
        pixels = torch.randn(1, 3, height, width, generator=generator).to(like)
        try:
            with torch.no_grad():
                body(pixels)
            break
        except (RuntimeError, AssertionError):
            if (height, width) == usual:
                raise
    return pixels


def fold_batch_norms(body: nn.Module, pixels: Tensor) -> int:
    """Fold every batch norm, trained or frozen, into the convolution directly before it, in place.

    Modules that run more than once and convolutions with computed weights are left alone. `body` is in evaluation mode.
    A forward pass of `pixels` (B, 3, H, W) shows which norm follows which convolution. Returns the number of folds.
    """
    convolution_of, run_counts, tapped = _convolutions_before_norms(body, pixels)
    folded = 0
    for name, norm in [item for item in body.named_modules() if item[1] in convolution_of]:
        convolution = convolution_of[norm]
        if run_counts[norm] > 1 or run_counts[convolution] > 1 or convolution in tapped:
            continue
        stats: Any = norm
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, stats.running_mean, stats.running_var, stats.eps,
            stats.weight, stats.bias,
        )  # fmt: skip
        # timm's norms include the activation.
        body.set_submodule(name, getattr(norm, "act", None) or nn.Identity())
        folded += 1
    return folded


def _convolutions_before_norms(
    body: nn.Module, pixels: Tensor
) -> tuple[dict[nn.Module, nn.Conv2d], Counter[nn.Module], set[nn.Conv2d]]:
    """The convolution before each norm, how often each module runs, and convolutions whose output is a feature map."""
    producer: dict[int, nn.Conv2d] = {}
    outputs: list[Tensor] = []  # kept alive, so that ids stay unique
    run_counts: Counter[nn.Module] = Counter()
    convolution_of: dict[nn.Module, nn.Conv2d] = {}

    def after_convolution(module: Any, _: Any, output: Tensor) -> None:
        run_counts[module] += 1
        producer[id(output)] = module
        outputs.append(output)

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        run_counts[module] += 1
        if id(inputs[0]) in producer:
            convolution_of[module] = producer[id(inputs[0])]

    hooks = []
    for module in body.modules():
        if is_convolution(module):
            hooks.append(module.register_forward_hook(after_convolution))
        elif _is_batch_norm(module):
            hooks.append(module.register_forward_pre_hook(before_norm))
    with torch.no_grad():
        features = body(pixels)
    for hook in hooks:
        hook.remove()
    # xception41p returns the map between a convolution and its norm, which must not change.
    tapped = {producer[id(x)] for x in features if id(x) in producer}
    return convolution_of, run_counts, tapped


def _is_batch_norm(module: nn.Module) -> bool:
    """True for nn.BatchNorm2d, timm's norm with an activation, and the frozen forms of both."""
    return "Batch" in type(module).__name__ and all(
        hasattr(module, name) for name in ("running_mean", "running_var", "weight", "bias", "eps")
    )
