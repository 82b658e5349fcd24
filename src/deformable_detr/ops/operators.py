"""The ops as torch knows them: opaque to compilers, with shapes for tracing, gradients, and a kernel for each device.

Graphs that hold them run wherever this package is installed: each kernel picks, when it runs, the fastest way that
machine has. `dispatch` decides whether a call becomes one of these ops at all.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import embedding_bag, reference, reference_backward, triton_backend
from .native import library

logger = logging.getLogger("deformable_detr.ops")
_announced: set[str] = set()
forced: str | None = None  # set by dispatch.use_backend


def announce(backend: str, detail: str, slow: bool = False) -> None:
    """One log line for each backend that runs."""
    if backend not in _announced:
        _announced.add(backend)
        logger.log(logging.WARNING if slow else logging.INFO, "deformable attention runs on %s (%s)", backend, detail)


def _pairs(shapes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(shapes[::2], shapes[1::2], strict=True))


def _use_library() -> bool:
    """Whether the compiled CPU library takes the call; an error if it was asked for and is missing."""
    if forced == "embedding_bag":
        return False
    found, detail = library.status()
    if found is None and forced == "cpu":
        raise RuntimeError(f"backend 'cpu' is not available: {detail}")
    if found is None:
        announce("embedding_bag", f"plain PyTorch, slower than the compiled library: {detail}", slow=True)
    else:
        announce("cpu", f"compiled library, {detail}")
    return found is not None


def _use_triton() -> bool:
    """The same for the GPU kernels."""
    found, detail = triton_backend.status()
    if not found and forced == "triton":
        raise RuntimeError(f"backend 'triton' is not available: {detail}")
    if found:
        announce("triton", detail)
    else:
        announce("reference", f"plain PyTorch, slower than the GPU kernels: {detail}", slow=True)
    return found


def _fast(device: str) -> ModuleType | None:
    """What runs a call on this device faster than plain PyTorch, if anything."""
    if forced in ("cpu", "embedding_bag", "triton") and device != ("cuda" if forced == "triton" else "cpu"):
        raise RuntimeError(f"backend {forced!r} was asked for and does not run on {device}")
    if device == "cpu" and _use_library():
        return library
    if device == "cuda" and _use_triton():
        return triton_backend
    return None


def _plain_forward(value: Tensor, shapes: list[int], points: Tensor | None, offsets: Tensor, logits: Tensor) -> Tensor:
    if value.device.type == "cpu":
        return embedding_bag.forward(value, shapes, points, offsets, logits)
    with torch.autocast(value.device.type, enabled=False):
        if points is None:
            return reference.sample_and_sum(value, _pairs(shapes), offsets.float(), logits.float())
        return reference.deformable_attention(value, _pairs(shapes), points.float(), offsets.float(), logits.float())


def _forward(value: Tensor, shapes: list[int], points: Tensor | None, offsets: Tensor, logits: Tensor) -> Tensor:
    fast = _fast(value.device.type)
    run = _plain_forward if fast is None else fast.forward
    return run(value, shapes, points, offsets, logits)


def _backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: list[int],
    points: Tensor | None,
    offsets: Tensor,
    logits: Tensor,
    reference_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    fast = _fast(value.device.type)
    run = reference_backward.backward if fast is None else fast.backward
    return run(grad_output, value, shapes, points, offsets, logits, reference_gradient)


# ---- deformable_attention -------------------------------------------------------------------------------------------


@torch.library.custom_op("deformable_detr::deformable_attention", mutates_args=())
def deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`reference.deformable_attention`; spatial_shapes flat: h0, w0, h1, w1, …"""
    return _forward(value, list(spatial_shapes), reference_points, sampling_offsets, attention_logits)


@torch.library.custom_op("deformable_detr::deformable_attention_backward", mutates_args=())
def deformable_attention_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    reference_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of value, reference_points (empty unless asked for), sampling_offsets and attention_logits."""
    value_, points_, offsets_, logits_ = _backward(
        grad_output, value, list(spatial_shapes), reference_points, sampling_offsets, attention_logits,
        reference_gradient,
    )  # fmt: skip
    return value_, reference_points.new_empty(0) if points_ is None else points_, offsets_, logits_


@deformable_attention.register_fake
def _(value, spatial_shapes, reference_points, sampling_offsets, attention_logits):
    return value.new_empty((value.shape[0], sampling_offsets.shape[1], value.shape[2] * value.shape[3]))


@deformable_attention_backward.register_fake
def _(grad_output, value, spatial_shapes, reference_points, sampling_offsets, attention_logits, reference_gradient):
    points_ = reference_points.new_empty(reference_points.shape if reference_gradient else 0)
    return (
        value.new_empty(value.shape),
        points_,
        sampling_offsets.new_empty(sampling_offsets.shape),
        attention_logits.new_empty(attention_logits.shape),
    )


def _save(ctx, inputs, output) -> None:
    value, ctx.spatial_shapes, points, offsets, logits = inputs
    ctx.save_for_backward(value, points, offsets, logits)


def _differentiate(ctx, grad_output):
    value, points, offsets, logits = ctx.saved_tensors
    wanted = ctx.needs_input_grad[2]
    value_, points_, offsets_, logits_ = deformable_attention_backward(
        grad_output, value, ctx.spatial_shapes, points, offsets, logits, wanted
    )
    return value_, None, points_ if wanted else None, offsets_, logits_


deformable_attention.register_autograd(_differentiate, setup_context=_save)


# ---- sample_and_sum -------------------------------------------------------------------------------------------------


@torch.library.custom_op("deformable_detr::sample_and_sum", mutates_args=())
def sample_and_sum(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """`reference.sample_and_sum`; spatial_shapes flat: h0, w0, h1, w1, …"""
    return _forward(value, list(spatial_shapes), None, sampling_locations, attention_weights)


@torch.library.custom_op("deformable_detr::sample_and_sum_backward", mutates_args=())
def sample_and_sum_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, sampling_locations and attention_weights."""
    value_, _, locations_, weights_ = _backward(
        grad_output, value, list(spatial_shapes), None, sampling_locations, attention_weights, False
    )
    return value_, locations_, weights_


@sample_and_sum.register_fake
def _(value, spatial_shapes, sampling_locations, attention_weights):
    return value.new_empty((value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3]))


@sample_and_sum_backward.register_fake
def _(grad_output, value, spatial_shapes, sampling_locations, attention_weights):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (value, sampling_locations, attention_weights))


def _save_sampled(ctx, inputs, output) -> None:
    value, ctx.spatial_shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _differentiate_sampled(ctx, grad_output):
    value, locations, weights = ctx.saved_tensors
    value_, locations_, weights_ = sample_and_sum_backward(grad_output, value, ctx.spatial_shapes, locations, weights)
    return value_, None, locations_, weights_


sample_and_sum.register_autograd(_differentiate_sampled, setup_context=_save_sampled)
