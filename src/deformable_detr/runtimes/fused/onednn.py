"""Products and convolutions with what follows them in one call.

On CPUs that is oneDNN's own call, by the operators that PyTorch's compiler uses, with weights laid out beforehand: the
sum or the activation is done while a result is still in the cache, and nothing is reordered at each call. They are not
part of PyTorch's public interface, so they are used only where they are there and compute what the public ones do.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_log = logging.getLogger(__name__)


class Activation(NamedTuple):
    """An activation as oneDNN knows it, and the module that computes the same."""

    name: str
    scalars: list[float]
    algorithm: str
    module: nn.Module


def activation_of(module: nn.Module) -> Activation | None:
    """How oneDNN calls an activation; none: it does not know it."""
    kind = type(module)
    if kind is nn.ReLU:
        return Activation("relu", [], "", nn.ReLU())
    if kind in (nn.ReLU6, nn.Hardtanh):
        low, high = float(module.min_val), float(module.max_val)  # pyright: ignore[reportArgumentType]
        return Activation("hardtanh", [low, high], "", nn.Hardtanh(low, high))
    if kind is nn.SiLU:
        return Activation("swish", [], "", nn.SiLU())
    if kind is nn.Hardswish:
        return Activation("hardswish", [], "", nn.Hardswish())
    if kind is nn.GELU:
        form = str(module.approximate)
        return Activation("gelu", [], form, nn.GELU(form))
    return None


@functools.cache
def available(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and processor have the calls in `dtype`, and they compute what they should."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16 and not has_bf16():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((5, 16), (24, 16), (24,)))
    try:
        product = PackedLinear(weight, bias, activation_of(nn.ReLU()), dtype, packed=True)
        convolution = PackedConv2d(_example(weight, bias), activation_of(nn.ReLU()), dtype, packed=True)
        pixels = x.view(1, 16, 5, 1).contiguous(memory_format=torch.channels_last)
        other = torch.ones(1, 24, 5, 1, dtype=dtype).contiguous(memory_format=torch.channels_last)
        mapped = (F.conv2d(pixels, weight[:, :, None, None], bias) + other).relu()
        pairs = [
            (product(x), F.linear(x, weight, bias).relu()),
            (convolution(pixels, other), mapped),
        ]
    except (AttributeError, RuntimeError, TypeError) as error:
        _log.info("no fused products in this PyTorch: %s", str(error).splitlines()[0])
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    right = all(bool(((a - b).abs() < tolerance).all()) for a, b in pairs)
    if not right:
        _log.warning("fused products of this PyTorch compute something else; they are not used")
    return right


@functools.cache
def has_bf16() -> bool:
    """Whether this processor multiplies bf16 numbers itself (AVX512-BF16 or AMX)."""
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capability:
        return bool(capability.get("avx512_bf16") or capability.get("amx_bf16"))
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


class PackedLinear(nn.Module):
    """x · Wᵀ + b, with the activation or the sum with another tensor in the same call.

    weight: (out, in). activation: none, or one of `activation_of`. packed: oneDNN's call, on CPUs where `available`.
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
            # No buffer: its layout is oneDNN's secret, and no other device could have it.
            self.laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
            self.call = (activation.name, activation.scalars, activation.algorithm) if activation else ("none", [], "")
        else:
            self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """x: (…, in). other: (…, out), added instead of an activation."""
        if self.packed:
            if other is not None:
                return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.laid_out, self.bias, "add")
            return torch.ops.mkldnn._linear_pointwise(x, self.laid_out, self.bias, *self.call)
        y = F.linear(x, self.weight, self.bias)
        if other is not None:
            return y + other
        return y if self.activation is None else self.activation.module(y)


class PackedConv2d(nn.Module):
    """A convolution, then the sum with another map and the activation in the same call. Channels last."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, convolution: nn.Conv2d, activation: Activation | None, dtype: torch.dtype, packed: bool) -> None:
        super().__init__()
        self.activation, self.packed = activation, packed
        self.kernel, self.stride = convolution.kernel_size, list(convolution.stride)
        self.dilation = list(convolution.dilation)
        self.same = type(convolution).__name__ == "Conv2dSame"  # TensorFlow's padding, by the input's size
        self.in_front = packed and self.same and _may_stand_in_front(convolution)
        padding: Any = [0, 0] if self.same else list(convolution.padding)  # integers: `takes`
        self.shape = (padding, self.stride, self.dilation, convolution.groups)
        bias = convolution.bias
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype), persistent=False)
        weight = convolution.weight.detach().to(dtype)
        if self.in_front:
            weight = F.pad(weight, (1, 0, 1, 0))
        weight = weight.contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight, persistent=False)
        self.call = (activation.name, activation.scalars, activation.algorithm) if activation else ("none", [], "")
        self.in_place = False
        self.laid_out: dict[bytes, Tensor] = {}  # weights by their layouts
        self.layouts: dict[torch.Size, bytes] = {}  # by sizes of the input

    def _weight(self, x: Tensor, shape: tuple[Any, ...]) -> Tensor:
        """The weight in the layout of oneDNN's own that it wants for a size of the input.

        Laying it out at each call takes 3 to 8% of a forward pass, and what is made for one size can cost tenfold time
        at another. But most sizes share a layout: only what a new one gives shows which, and one of each is kept.
        """
        size = x.shape[1:]  # any batch: the layout depends on it little
        known = self.laid_out.get(self.layouts.get(size, b""))
        if known is not None:
            return known
        made: Tensor = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *shape, list(x.shape))
        layout = torch.ops.mkldnn._get_mkldnn_serialized_md(made).numpy().tobytes()
        others = {other: kept for other, kept in self.laid_out.items() if other != layout}
        weight = self.laid_out.get(layout, made)
        # New dictionaries, as other threads may read the old ones.
        self.laid_out = {**dict(list(others.items())[1 - LAYOUTS :]), layout: weight}
        self.layouts = {**dict(list(self.layouts.items())[1 - SIZES :]), size: layout}
        return weight

    def _margins(self, x: Tensor) -> list[int]:
        """Rows and columns of zeros on each side for a kernel that begins one before its own first ones."""
        from timm.layers.padding import get_same_padding

        sizes = zip(x.shape[2:], self.kernel, self.stride, self.dilation, strict=True)
        return [get_same_padding(*size) // 2 + 1 for size in sizes]  # pyright: ignore[reportReturnType]

    @staticmethod
    def takes(module: Any) -> bool:
        """Whether a module is a convolution of the kinds known here."""
        known = type(module) is nn.Conv2d or type(module).__name__ == "Conv2dSame"
        return known and module.padding_mode == "zeros" and not isinstance(module.padding, str)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """x: (B, in, H, W). other: (B, out, h, w), which is overwritten where `in_place` is set."""
        shape = self.shape
        if self.in_front:
            shape = (self._margins(x), *shape[1:])
        elif self.same:
            from timm.layers.padding import pad_same

            x = pad_same(x, list(self.kernel), self.stride, self.dilation)
        if self.packed:
            x = x.contiguous(memory_format=torch.channels_last)
            weight = self._weight(x, shape)
            if other is None:
                return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *shape, *self.call)
            unary = self.call if self.activation else (None, [], None)
            call = torch.ops.mkldnn._convolution_pointwise.binary
            if self.in_place and other.is_contiguous(memory_format=torch.channels_last):
                call = torch.ops.mkldnn._convolution_pointwise_.binary
                return call(other, x, weight, self.bias, *shape, "add", 1.0, *unary)
            other = other.contiguous(memory_format=torch.channels_last)
            return call(x, other, weight, self.bias, *shape, "add", 1.0, *unary)
        padding, stride, dilation, groups = shape
        y = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
        if other is not None:
            y = y + other
        return y if self.activation is None else self.activation.module(y)


def _may_stand_in_front(convolution: nn.Conv2d) -> bool:
    """Whether "same" padding, one wider after the map than before it, can be done without a padded copy of the map.

    A row and a column of zeros in front of the kernel, and margins of one pixel more than before the map, read the same
    pixels. In a depthwise convolution these products are nearly free, and the copy was the larger part of its time.
    """
    sizes = zip(convolution.kernel_size, convolution.stride, convolution.dilation, strict=True)
    depthwise = convolution.groups == convolution.in_channels == convolution.out_channels
    return depthwise and all(kernel >= stride > 1 and dilation == 1 for kernel, stride, dilation in sizes)


ROWS = 2048  # about as many rows of a product at a time: what belongs to them stays in the cache
LAYOUTS, SIZES = 3, 256  # of a convolution, at most; 60 sizes of images had 3 at most, 1.1 to 1.4 of the weights' size


def _example(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
    convolution.weight.data, convolution.bias.data = weight[:, :, None, None], bias  # type: ignore[union-attr]
    return convolution
