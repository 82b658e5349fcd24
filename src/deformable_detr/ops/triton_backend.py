"""Launch the GPU kernels. Triton is not imported before the first call on a GPU."""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from .reference import OpInputs

MIN_CAPABILITY = (7, 5)
_TILE = 8  # pixels; the encoder's queries run in squares of this side


@functools.cache
def status() -> tuple[bool, str]:
    """Return whether the kernels run here, and on what GPU or why not."""
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed"
    if not torch.cuda.is_available():
        return False, "torch finds no GPU"
    name = torch.cuda.get_device_name()
    if torch.version.hip is None and torch.cuda.get_device_capability() < MIN_CAPABILITY:
        return False, f"{name} has a compute capability below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return True, f"Triton kernels, {name}"


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def configuration(channels: int, levels: int, points: int, fixed: bool = False) -> tuple[dict[str, int], int]:
    """Return block sizes and number of warps for D, L and P.

    A program holds BQ × N × DP numbers, about 32 per thread, or half as many with `fixed` point sums of 64 bits.
    """
    N, DP = _power_of_two(levels * points), _power_of_two(channels)
    one_warp = 512 if fixed else 1024
    BQ = max(1, one_warp // (N * DP))
    return {"N": N, "DP": DP, "BQ": BQ}, min(8, max(1, _power_of_two(BQ * N * DP // one_warp)))


@functools.lru_cache(maxsize=64)
def _geometry(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    rows, start = [], 0
    for height, width in shapes:
        rows.append((height, width, start))
        start += height * width
    return torch.tensor(rows, dtype=torch.int32).to(device)


@functools.lru_cache(maxsize=16)
def _order(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """The encoder's queries square by square: neighbors read the same values, while these are in the cache."""
    order, start = [], 0
    for height, width in shapes:
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        tile = (y // _TILE) * (-(-width // _TILE)) + x // _TILE
        order.append(start + tile.flatten().argsort(stable=True))
        start += height * width
    return torch.cat(order).to(torch.int32).to(device)


def _prepare(inputs: OpInputs, fixed: bool = False) -> tuple[list[Tensor], dict[str, Any], tuple[int, int, int]]:
    """Tensor arguments, keyword arguments and grid of both kernels."""
    value, _, reference_points, offsets, logits = inputs
    B, S, M, D = value.shape
    Q, L, P = offsets.shape[1], offsets.shape[3], offsets.shape[4]
    blocks, warps = configuration(D, L, P, fixed)
    geometry = _geometry(inputs.spatial_shapes, value.device)
    ordered = Q == S and Q > _TILE**2
    points = geometry if reference_points is None else reference_points.float().contiguous()
    tensors = [
        value.contiguous(), offsets.contiguous(), logits.contiguous(), points,
        _order(inputs.spatial_shapes, value.device) if ordered else geometry, geometry,
    ]  # fmt: skip
    options = {
        "Q": Q, "S": S, "M": M, "D": D, "L": L, "P": P,
        "REF": 0 if reference_points is None else reference_points.shape[-1],
        "ORDERED": ordered, "num_warps": warps, "enable_fp_fusion": True, **blocks,
    }  # fmt: skip
    return tensors, options, (-(-Q // blocks["BQ"]), M, B)


def forward(inputs: OpInputs) -> Tensor:
    """Like `native.library.forward`."""
    from . import triton_kernels

    B, _, M, D = inputs.value.shape
    output = inputs.value.new_empty((B, inputs.offsets.shape[1], M * D))
    if not output.numel():
        return output
    tensors, options, grid = _prepare(inputs)
    triton_kernels.forward[grid](*tensors, output, **options)  # pyright: ignore[reportCallIssue]
    return output


def backward(
    grad_output: Tensor, inputs: OpInputs, reference_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Like `native.library.backward`; reproducible under `torch.use_deterministic_algorithms`."""
    from . import triton_kernels

    value, shapes, reference_points, offsets, logits = inputs
    fixed = torch.are_deterministic_algorithms_enabled()
    sums = torch.zeros(value.shape, dtype=torch.int64 if fixed else torch.float32, device=value.device)
    grad_logits = logits.new_empty(logits.shape)
    exact = reference_points is not None and (reference_points.shape[-1] == 4 or reference_gradient)
    grad_pixels = offsets.new_empty(offsets.shape, dtype=torch.float32 if exact else offsets.dtype)
    scale = _fixed_point_scale(grad_output, inputs) if fixed else sums
    if grad_output.numel():
        tensors, options, grid = _prepare(inputs, fixed)
        arguments = (grad_output.contiguous(), *tensors, scale, sums, grad_pixels, grad_logits)
        triton_kernels.backward[grid](*arguments, FIXED=fixed, **options)  # pyright: ignore[reportCallIssue]
    grad_value = (sums.double() / scale.double()).to(value.dtype) if fixed else sums.to(value.dtype)
    if reference_points is None:
        return grad_value, None, grad_pixels, grad_logits
    grad_reference, grad_offsets = _reference_backward(grad_pixels, shapes, reference_points, offsets)
    return grad_value, grad_reference if reference_gradient else None, grad_offsets, grad_logits


def _reference_backward(
    grad_pixels: Tensor, shapes: list[int], reference_points: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of reference points and offsets from those of the sampled pixel positions."""
    if reference_points.shape[-1] == 2 and grad_pixels.dtype != torch.float32:
        return reference_points, grad_pixels  # the caller ignores the first
    size = torch.tensor(shapes, dtype=torch.float32).view(-1, 2).flip(-1).to(grad_pixels.device)  # (L, 2)
    center = grad_pixels.sum((2, 4)) * size
    if reference_points.shape[-1] == 2:
        return center.to(reference_points.dtype), grad_pixels.to(offsets.dtype)
    half = 0.5 / offsets.shape[4]
    extent = (grad_pixels * offsets.float()).sum((2, 4)) * size * half
    scale = reference_points[:, :, None, :, None, 2:].float() * size[:, None] * half
    return torch.cat([center, extent], -1).to(reference_points.dtype), (grad_pixels * scale).to(offsets.dtype)


def _fixed_point_scale(grad_output: Tensor, inputs: OpInputs) -> Tensor:
    """A power of two (1,) that scales the largest possible sum to below 2^62."""
    largest = grad_output.abs().amax().float() if grad_output.numel() else grad_output.new_ones((), dtype=torch.float32)
    if inputs.reference_points is None and inputs.logits.numel():
        largest = largest * inputs.logits.abs().amax().float()
    _, Q, _, L, P = inputs.logits.shape
    terms = Q * L * P * 4
    bits = 62 - (terms - 1).bit_length() - largest.clamp(min=1e-30).log2().ceil()
    return bits.clamp(max=100.0).exp2().reshape(1)
