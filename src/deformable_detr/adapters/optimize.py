"""A faster copy of a `TransformersDetector` for inference."""

import copy
import math
import os
import sys
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import accelerate
from ..predict.predictor import Detector
from ..runtimes.fused.detector import checked_dtype
from ..runtimes.fused.folding import fold_batch_norms

DetectorT = TypeVar("DetectorT", bound=Detector)
_FROZEN_EPS = 1e-5  # a constant in the code of transformers' frozen batch norms


class OptimizedAdapter(Detector):
    """The result of `TransformersDetector.optimize`, with the same outputs.

    This package's attention op, batch norms and RepVGG branches folded into convolutions, channels-last maps.

    Args:
        model: A `TransformersDetector`; not changed.
        precision: "fp32", or "bf16" by autocast.

    Raises:
        UserError: The precision is unknown, or the processor lacks it.
    """

    def __init__(self, model: Any, precision: str = "fp32") -> None:
        super().__init__()
        self.config, self.dtype = model.config, checked_dtype(precision, model.pixel_mean.device)
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, model.get_buffer(name).clone(), persistent=False)
        self.model = inference_copy(model).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, pixels: Tensor, padding_mask: Tensor | None = None) -> dict[str, Any]:
        """Return `pred_logits` and `pred_boxes` in fp32; see `Detector`."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            outputs = self.model(pixels, padding_mask)
        return {name: value.float() for name, value in outputs.items()}


class TraceableNetwork(nn.Module):
    """A model for `torch.export`, without what transformers' code does that a file cannot express.

    `len(tensor)` would make the batch size a constant, and ONNX has no operator for the checks of tensors.
    """

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, padding_mask: Tensor) -> dict[str, Any]:
        code = sys.modules[type(self.model.get_submodule("network")).__module__]
        no_checks = mock.patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1")
        with no_checks, mock.patch.object(code, "len", _length, create=True):
            return self.model(pixels, padding_mask)


def _length(value: Any) -> int:
    return value.shape[0] if isinstance(value, Tensor) else len(value)


def inference_copy(model: DetectorT) -> DetectorT:
    """Copy a `TransformersDetector` for inference in fp32: this package's attention, norms and branches folded."""
    config, device = model.config, model.pixel_mean.device
    model = copy.deepcopy(model).float().eval().requires_grad_(False)
    network = model.get_submodule("network")
    divisor = config.size_divisor
    side = math.ceil(max(128, 16 * math.sqrt(config.num_queries)) / divisor) * divisor  # a token per query at stride 16
    fold_batch_norms_of(network, torch.zeros(1, 3, side, side, device=device))
    fuse_repvgg(network)
    accelerate(network)
    return model


def fold_batch_norms_of(network: nn.Module, pixels: Tensor) -> int:
    """Fold the batch norms of transformers' model into its convolutions, in place; return their number."""
    for module in network.modules():
        if type(module).__name__.endswith("FrozenBatchNorm2d") and not hasattr(module, "eps"):
            module.eps = _FROZEN_EPS  # pyright: ignore[reportArgumentType]
    return fold_batch_norms(network, pixels)


def fuse_repvgg(network: nn.Module) -> int:
    """Merge the 3×3 and 1×1 branches of RepVGG blocks, whose norms are folded, in place; return the number of blocks.

    Both are linear, so their sum is one 3×3 convolution (Ding et al. 2021, section 3.3).
    """
    blocks = [item for item in network.named_modules() if type(item[1]).__name__.endswith("RepVggBlock")]
    fused = 0
    for name, block in blocks:
        first, second = (getattr(getattr(block, branch, None), "conv", None) for branch in ("conv1", "conv2"))
        if first is None or second is None or (first.kernel_size, second.kernel_size) != ((3, 3), (1, 1)):
            continue
        if first.bias is None or second.bias is None:  # a norm that was not folded
            continue
        first.weight = nn.Parameter(first.weight + F.pad(second.weight, [1, 1, 1, 1]), requires_grad=False)
        first.bias = nn.Parameter(first.bias + second.bias, requires_grad=False)
        network.set_submodule(name, nn.Sequential(block.conv1, block.activation))  # type: ignore[arg-type]
        fused += 1
    return fused
