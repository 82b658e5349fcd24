"""A faster copy of a `TransformersDetector` for inference."""

import copy
import math
import os
import sys
from contextlib import suppress
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..config.image_size import FixedSize
from ..ops import accelerate
from ..predict.predictor import Detector
from ..runtimes.fused.detector import OptimizedCopy, checked_dtype
from ..runtimes.fused.folding import fold_batch_norms
from ..runtimes.fused.onednn import PackedConv2d, fusable_activation, is_available
from ..runtimes.fused.packing import pack_layers
from ..utils.errors import UserError
from .families import box_network
from .hybrid_encoder import FusedHybridEncoder

DetectorT = TypeVar("DetectorT", bound=Detector)
_BACKBONE = ("backbone",)
_HYBRID_PARTS = ("backbone", "conv_encoder", "encoder_input_proj", "encoder", "decoder_input_proj")
_FROZEN_EPS = 1e-5  # a constant in the code of transformers' frozen batch norms


class OptimizedAdapter(OptimizedCopy):
    """The result of `TransformersDetector.optimize`, with the same outputs.

    It runs this package's attention; batch norms and RepVGG branches are folded into convolutions; convolutions and
    linear layers are packed and fused with what follows them. In bf16 the backbone, a hybrid encoder and the values of
    the attention are in half precision; queries, boxes and classes stay in fp32.

    Args:
        model: A `TransformersDetector`; not changed.
        precision: "fp32" or "bf16".
        compile: Compile the network with `torch.compile` at the first call, for any size.

    Raises:
        UserError: The precision is unknown, or the processor lacks it.
    """

    def __init__(self, model: Any, precision: str = "fp32", compile: bool = False) -> None:
        super().__init__()
        device = model.pixel_mean.device
        self.config, self.dtype = model.config, checked_dtype(precision, device)
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, model.get_buffer(name).float(), persistent=False)
        packed = not compile and device.type == "cpu" and is_available(self.dtype) and is_available(torch.float32)
        self.model = inference_copy(model)
        pack(self.model, self.dtype, packed)
        if compile:
            self.model.network.compile(dynamic=True)

    @torch.no_grad()
    def forward(self, pixels: Tensor, padding_mask: Tensor | None = None) -> dict[str, Any]:
        """Return the outputs of the model in fp32; see `Detector`."""
        pixels = pixels.to(self.dtype).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():  # 2% faster than `no_grad`
            outputs = self.model(pixels, padding_mask)
        return {name: value.float().clone() for name, value in outputs.items()}


class TraceableNetwork(nn.Module):
    """A model for `torch.export`, without what transformers' code does that a file cannot express.

    `len(tensor)` would make the batch size a constant, and ONNX has no operator for the checks of tensors. Of limits
    that follow one another, the ONNX converter drops one that is still read.
    """

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, padding_mask: Tensor) -> dict[str, Any]:
        code = sys.modules[type(self.model.get_submodule("network")).__module__]
        no_checks = mock.patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1")
        replaced = mock.patch.multiple(code, create=True, len=_length, inverse_sigmoid=_inverse_sigmoid)
        with no_checks, replaced:
            return self.model(pixels, padding_mask)


def _length(value: Any) -> int:
    return value.shape[0] if isinstance(value, Tensor) else len(value)


def _inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    return torch.log(x.clamp(eps, 1.0) / (1 - x).clamp(eps, 1.0))


def inference_copy(model: DetectorT) -> DetectorT:
    """Copy a `TransformersDetector` for inference in fp32: this package's attention, norms and branches folded."""
    model = copy.deepcopy(model).float().eval().requires_grad_(False)
    network = model.get_submodule("network")
    fold_batch_norms_of(network, _example(model))
    fuse_repvgg(network)
    with suppress(UserError):  # no layer that the op can run: all sample the nearest pixel
        accelerate(network)
    return model


def _example(model: Any) -> Tensor:
    """Return pixels (1, 3, H, W) that the network takes, all zero."""
    rule, divisor = model.resize_rule, model.config.size_divisor
    if isinstance(rule, FixedSize):  # anchors may exist for this size only
        size = (rule.height, rule.width)
    else:
        side = max(192, 16 * math.sqrt(model.config.num_queries))  # a token per query at stride 16
        size = (math.ceil(side / divisor) * divisor,) * 2
    return torch.zeros(1, 3, *size, device=model.pixel_mean.device)


def pack(model: Detector, dtype: torch.dtype, packed: bool) -> None:
    """Pack the layers of an `inference_copy`, in place: the backbone, hybrid encoder and values in `dtype`.

    `packed` is that of `PackedLinear`.
    """
    network: Any = box_network(model.get_submodule("network"))
    pixels, hybrid = _example(model), hasattr(network.model, "generate_anchors")
    parts = [name for name in (_HYBRID_PARTS if hybrid else _BACKBONE) if hasattr(network.model, name)]
    half = tuple(f"model.{name}." for name in (*parts, *(["enc_output"] if hybrid else [])))

    def dtype_of(name: str) -> torch.dtype:
        return dtype if name.startswith(half) or name.endswith("value_proj") else torch.float32

    if FusedHybridEncoder.supports(network.model):
        network.model.encoder = FusedHybridEncoder(network.model)
    pack_layers(network, lambda: model(pixels), dtype_of, packed)
    fuse_residuals(network)
    for name, module in list(network.named_modules()):
        if type(module).__name__.endswith("LearnableAffineBlock"):
            network.set_submodule(name, Affine(module))
    if hybrid:
        network.model.enc_bbox_head = ProposalBoxes(network.model, model.config.num_queries)
    if dtype == torch.float32:
        return
    for name in parts:
        network.model.get_submodule(name).to(dtype)
    if hybrid and network.config.anchor_image_size is None:
        anchors = network.model.generate_anchors
        network.model.generate_anchors = lambda *args, **options: anchors(*args, **options | {"dtype": torch.float32})
        network.model.enc_output[0].output = torch.float32
        return
    last = network.model.get_submodule(parts[-1])
    for module in last if isinstance(last, nn.ModuleList) else [last]:
        module.register_forward_hook(lambda _, inputs, output: _to_fp32(output))


def _to_fp32(value: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, value)


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


def fuse_residuals(network: nn.Module) -> None:
    """Let the last convolution of each block of transformers' ResNets add the shortcut and activate, in place."""
    for name, block in list(network.named_modules()):
        parts = [getattr(block, part, None) for part in ("layer", "shortcut", "activation")]
        if "ResNet" not in type(block).__name__ or not isinstance(parts[0], nn.Sequential):
            continue
        last = getattr(parts[0][-1], "convolution", None)
        if type(parts[2]) is nn.ReLU and isinstance(last, PackedConv2d):  # oneDNN has no other activation of a sum
            network.set_submodule(name, ResidualBlock(parts[0], last, parts[1]))


class ResidualBlock(nn.Module):
    """last(first(x), shortcut(x)): `last` adds and activates."""

    def __init__(self, layers: nn.Sequential, last: PackedConv2d, shortcut: Any) -> None:
        super().__init__()
        self.first, self.last, self.shortcut = layers[:-1], last, shortcut
        last.set_activation(fusable_activation(nn.ReLU()))
        last.in_place = type(shortcut) is not nn.Identity  # then nothing else reads the map that it adds to

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H', W')."""
        return self.last(self.first(x), self.shortcut(x))


class Affine(nn.Module):
    """HGNetV2's learnable affine block, scale · x + bias, in one pass."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.scale, self.bias = float(block.scale), block.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.bias, x, alpha=self.scale)


class ProposalBoxes(nn.Module):
    """Boxes (B, S, 4) of the tokens (B, S, C) with the best scores; 0 for the others, which nothing reads.

    Some more than the queries, so that rounding does not matter.
    """

    margin = 64

    def __init__(self, model: Any, num_queries: int) -> None:
        super().__init__()
        self.boxes, self.scores, self.count = model.enc_bbox_head, model.enc_score_head, num_queries + self.margin

    def forward(self, memory: Tensor) -> Tensor:
        best = self.scores(memory).amax(-1)
        chosen = best.topk(min(self.count, best.shape[1]), dim=1).indices[..., None]
        boxes = self.boxes(memory.gather(1, chosen.expand(-1, -1, memory.shape[2])))
        return boxes.new_zeros(*best.shape, 4).scatter(1, chosen.expand(-1, -1, 4), boxes)
