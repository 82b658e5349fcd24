"""Linear layers and convolutions fused with the addition or activation that follows them.

On CPUs they call oneDNN through operators that PyTorch's compiler uses, with weights packed in advance. These operators
are not public, so `is_available` compares their results with the public ones before they are used.
"""

import functools
import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...utils.errors import first_line

_log = logging.getLogger(__name__)
CHUNK_ROWS = 2048  # rows per call of a linear layer, so that intermediate results stay in the cache
# Per convolution. 60 image sizes needed at most 3 layouts, 1.1 to 1.4 times the memory of the weights.
MAX_WEIGHT_LAYOUTS, MAX_INPUT_SIZES = 3, 256


class Activation(NamedTuple):
    """An activation by oneDNN's name, scalars and algorithm, and the module that computes the same."""

    arguments: tuple[str, list[float], str]
    module: nn.Module


_NO_ACTIVATION = ("none", [], "")


def fusable_activation(module: nn.Module) -> Activation | None:
    """Return an activation in oneDNN's terms, or None if oneDNN does not have it."""
    if isinstance(module, nn.Hardtanh):  # ReLU6 too
        low, high = module.min_val, module.max_val
        return Activation(("hardtanh", [low, high], ""), nn.Hardtanh(low, high))
    if isinstance(module, nn.GELU):
        return Activation(("gelu", [], module.approximate), nn.GELU(module.approximate))
    kinds: dict[str, tuple[str, type[nn.Module]]] = {
        "ReLU": ("relu", nn.ReLU), "SiLU": ("swish", nn.SiLU), "Hardswish": ("hardswish", nn.Hardswish),
        "SiLUActivation": ("swish", nn.SiLU),  # transformers'
    }  # fmt: skip
    name, kind = kinds.get(type(module).__name__, (None, None))
    return None if name is None or kind is None else Activation((name, [], ""), kind())


@functools.cache
def is_available(dtype: torch.dtype) -> bool:
    """Return whether PyTorch and the processor have oneDNN's fused operators in `dtype`, with correct results."""
    if not torch.backends.mkldnn.is_available() or (dtype == torch.bfloat16 and not has_bf16()):
        return False
    try:
        pairs = _fused_and_public_results(dtype)
    except (AttributeError, RuntimeError, TypeError) as error:
        _log.info("this PyTorch has no fused operators of oneDNN: %s", first_line(error))
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    correct = all(bool(((a - b).abs() < tolerance).all()) for a, b in pairs)
    if not correct:
        _log.warning("the fused operators of this PyTorch return wrong values and are not used")
    return correct


def _fused_and_public_results(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Results of a packed linear layer and a packed convolution, each with the public operators' result."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((5, 16), (24, 16), (24,)))
    linear = PackedLinear(weight, bias, fusable_activation(nn.ReLU()), dtype, packed=True)
    plain = nn.Conv2d(16, 24, 1)
    plain.weight.data, plain.bias.data = weight[:, :, None, None], bias  # type: ignore[union-attr]
    convolution = PackedConv2d(plain, fusable_activation(nn.ReLU()), dtype, packed=True)
    pixels = x.view(1, 16, 5, 1).contiguous(memory_format=torch.channels_last)
    other = torch.ones(1, 24, 5, 1, dtype=dtype).contiguous(memory_format=torch.channels_last)
    expected = (F.conv2d(pixels, weight[:, :, None, None], bias) + other).relu()
    return [(linear(x), F.linear(x, weight, bias).relu()), (convolution(pixels, other), expected)]


@functools.cache
def has_bf16() -> bool:
    """Return whether the processor has bf16 instructions (AVX512-BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def is_convolution(module: object) -> bool:
    """Return whether a module is PyTorch's convolution, or timm's with "same" padding, but no subclass of them."""
    return type(module) is nn.Conv2d or type(module).__name__ == "Conv2dSame"


class PackedLinear(nn.Module):
    """x · Wᵀ + b with weight (out, in), fused with an activation or with the addition of another tensor.

    `packed` calls oneDNN with packed weights; it needs a CPU where `is_available(dtype)`.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, activation: Activation | None, dtype: torch.dtype, packed: bool
    ) -> None:
        super().__init__()
        self.activation, self.packed = activation, packed
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype), persistent=False)
        weight = weight.detach().to(dtype).contiguous()
        if packed:
            # Not a buffer: the layout is private to oneDNN and cannot move to another device.
            self.packed_weight = torch.ops.mkldnn._reorder_linear_weight(weight, CHUNK_ROWS)
            self.activation_arguments = activation.arguments if activation else _NO_ACTIVATION
        else:
            self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """x: (…, in). other: (…, out), added instead of the activation."""
        if self.packed:
            if other is not None:
                return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed_weight, self.bias, "add")
            return torch.ops.mkldnn._linear_pointwise(x, self.packed_weight, self.bias, *self.activation_arguments)
        y = F.linear(x, self.weight, self.bias)
        if other is not None:
            return y + other
        return y if self.activation is None else self.activation.module(y)


class PackedConv2d(nn.Module):
    """A convolution fused with the addition of another map and an activation, in channels-last format.

    `packed` is as in `PackedLinear`. If `in_place` is set, `forward` overwrites the map that it adds.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, convolution: nn.Conv2d, activation: Activation | None, dtype: torch.dtype, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.kernel, self.stride = convolution.kernel_size, list(convolution.stride)
        self.dilation = list(convolution.dilation)
        self.same_padding = type(convolution).__name__ == "Conv2dSame"  # TensorFlow's, depends on the input size
        self.shifted_kernel = packed and self.same_padding and _allows_shifted_kernel(convolution)
        padding: Any = [0, 0] if self.same_padding else list(convolution.padding)  # integers: see `supports`
        self.geometry: tuple[Any, ...] = (padding, self.stride, self.dilation, convolution.groups)
        bias = convolution.bias
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype), persistent=False)
        weight = convolution.weight.detach().to(dtype)
        if self.shifted_kernel:
            weight = F.pad(weight, (1, 0, 1, 0))
        weight = weight.contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight, persistent=False)
        self.set_activation(activation)
        self.in_place = False
        self.packed_weights: dict[bytes, Tensor] = {}  # by layout
        self.layouts: dict[torch.Size, bytes] = {}  # by input size

    def set_activation(self, activation: Activation | None) -> None:
        """Change the activation that follows."""
        self.activation = activation
        self.activation_arguments = activation.arguments if activation else _NO_ACTIVATION

    @staticmethod
    def supports(module: Any) -> bool:
        """Return whether a module is a convolution that can be packed."""
        return is_convolution(module) and module.padding_mode == "zeros" and not isinstance(module.padding, str)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """x: (B, in, H, W). other: (B, out, h, w), added before the activation."""
        padding, stride, dilation, groups = self.geometry
        if self.same_padding:
            from timm.layers import padding as same

            if self.shifted_kernel:  # one more pixel, for the kernel's row and column of zeros
                sizes = zip(x.shape[2:], self.kernel, self.stride, self.dilation, strict=True)
                padding = [int(same.get_same_padding(*size)) // 2 + 1 for size in sizes]
            else:
                x = same.pad_same(x, list(self.kernel), self.stride, self.dilation)
        if self.packed:
            return self._forward_packed(x, other, (padding, stride, dilation, groups))
        y = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
        if other is not None:
            y = y + other
        return y if self.activation is None else self.activation.module(y)

    def _forward_packed(self, x: Tensor, other: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        weight = self._packed_weight(x, geometry)
        if other is None:
            arguments = self.activation_arguments
            return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *geometry, *arguments)
        unary = self.activation_arguments if self.activation else (None, [], None)
        if self.in_place and other.is_contiguous(memory_format=torch.channels_last):
            call = torch.ops.mkldnn._convolution_pointwise_.binary
            return call(other, x, weight, self.bias, *geometry, "add", 1.0, *unary)
        other = other.contiguous(memory_format=torch.channels_last)
        call = torch.ops.mkldnn._convolution_pointwise.binary
        return call(x, other, weight, self.bias, *geometry, "add", 1.0, *unary)

    def _packed_weight(self, x: Tensor, geometry: tuple[Any, ...]) -> Tensor:
        """The weight in the layout that oneDNN prefers for this input size.

        Packing at every call costs 3 to 8% of a forward pass, and a layout for another size can be ten times slower.
        Most sizes share a layout, so one copy per layout is cached.
        """
        size = x.shape[1:]  # the layout hardly depends on the batch
        weight = self.packed_weights.get(self.layouts.get(size, b""))
        if weight is not None:
            return weight
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *geometry, list(x.shape))
        layout = torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy().tobytes()
        others = {key: value for key, value in self.packed_weights.items() if key != layout}
        weight = self.packed_weights.get(layout, packed)
        # New dictionaries, because other threads may be reading the old ones.
        self.packed_weights = {**dict(list(others.items())[1 - MAX_WEIGHT_LAYOUTS :]), layout: weight}
        self.layouts = {**dict(list(self.layouts.items())[1 - MAX_INPUT_SIZES :]), size: layout}
        return weight


def _allows_shifted_kernel(convolution: nn.Conv2d) -> bool:
    """Return whether asymmetric "same" padding can be replaced by a row and a column of zeros in front of the kernel.

    This reads the same pixels without a padded copy of the map, which took most of the time of a strided depthwise
    convolution; the additional products are nearly free there.
    """
    sizes = zip(convolution.kernel_size, convolution.stride, convolution.dilation, strict=True)
    depthwise = convolution.groups == convolution.in_channels == convolution.out_channels
    return depthwise and all(kernel >= stride > 1 and dilation == 1 for kernel, stride, dilation in sizes)
