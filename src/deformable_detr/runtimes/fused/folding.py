"""A copy of the network without its training-only parts: batch norms folded, unused class heads removed."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

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
    if len(classes) > 1:  # inference reads the classes of the last layer or RoI head, and of the proposals only
        last = model.decoder.heads.last
        for layer in range(min(last, model.config.decoder_layers)):
            classes[layer] = classes[last]
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
    """The convolution before each norm, how often each module runs, and convolutions that others than a norm read."""
    producer: dict[tuple[int, int], nn.Conv2d] = {}
    outputs: list[Tensor] = []  # kept alive, so that ids stay unique
    run_counts: Counter[nn.Module] = Counter()
    convolution_of: dict[nn.Module, nn.Conv2d] = {}
    reads = ReadCounter()

    def after_convolution(module: Any, _: Any, output: Tensor) -> None:
        run_counts[module] += 1
        producer[identity(output)] = module
        outputs.append(reads.watch(output))

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        run_counts[module] += 1
        if identity(inputs[0]) in producer:
            convolution_of[module] = producer[identity(inputs[0])]

    hooks = []
    for module in body.modules():
        if is_convolution(module):
            hooks.append(module.register_forward_hook(after_convolution))
        elif _is_batch_norm(module):
            hooks.append(module.register_forward_pre_hook(before_norm))
    with torch.inference_mode(False), torch.no_grad(), reads:  # inference tensors do not count writes
        features = body(pixels)
    for hook in hooks:
        hook.remove()
    # xception41p returns the map between a convolution and its norm, which must not change.
    returned = {identity(x) for x in tree_leaves(features) if isinstance(x, Tensor)}
    tapped = {layer for output, layer in producer.items() if output in returned or reads.counts[output] > 1}
    return convolution_of, run_counts, tapped


def identity(tensor: Tensor) -> tuple[int, int]:
    """Return what tells the values of live tensors apart: the tensor, and how often it was written to."""
    return id(tensor), -1 if tensor.is_inference() else tensor._version


class ReadCounter(TorchFunctionMode):
    """Counts the calls of PyTorch that compute a tensor from each watched tensor, by `identity`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[int, int]] = Counter()

    def watch(self, tensor: Tensor) -> Tensor:
        """Start to count, since a tensor that is gone may have had the same id; return the tensor, to be kept alive."""
        self.counts[identity(tensor)] = 0
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = [identity(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) for x in tree_leaves(result)):
            self.counts.update(read)
        return result


def _is_batch_norm(module: nn.Module) -> bool:
    """True for nn.BatchNorm2d, timm's norm with an activation, and the frozen forms of both."""
    return "Batch" in type(module).__name__ and all(
        hasattr(module, name) for name in ("running_mean", "running_var", "weight", "bias", "eps")
    )
