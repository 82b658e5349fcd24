"""The op registered with torch.library: opaque to compilers, with a fake for tracing, and gradients.

A graph that contains it runs wherever this package is installed: the kernel picks the fastest backend when it runs.
`dispatch` decides whether a call becomes this op.
"""

import functools
import logging
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import embedding_bag, reference, reference_backward, triton_backend
from .native import library
from .reference import OpInputs

logger = logging.getLogger("deformable_detr.ops")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
forced: str | None = None  # set by dispatch.use_backend


@torch.library.custom_op("deformable_detr::attention", mutates_args=())
def attention(
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor | None,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`dispatch.deformable_attention`, or without reference_points `dispatch.sample_and_sum`.

    spatial_shapes: height, width, height, width, … of all levels.
    """
    inputs = OpInputs(value, list(spatial_shapes), reference_points, sampling_offsets, attention_logits)
    check(inputs)
    backend = _fast_backend(value.device.type)
    return _plain_forward(inputs) if backend is None else backend.forward(inputs)


@torch.library.custom_op("deformable_detr::attention_backward", mutates_args=())
def attention_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor | None,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    reference_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of value, reference_points (empty unless asked for), sampling_offsets and attention_logits."""
    inputs = OpInputs(value, list(spatial_shapes), reference_points, sampling_offsets, attention_logits)
    check(inputs)
    backend = _fast_backend(value.device.type) or reference_backward
    grad_value, grad_points, grad_offsets, grad_logits = backend.backward(grad_output, inputs, reference_gradient)
    return grad_value, value.new_empty(0) if grad_points is None else grad_points, grad_offsets, grad_logits


@attention.register_fake
def _(value, spatial_shapes, reference_points, sampling_offsets, attention_logits):
    return value.new_empty((value.shape[0], sampling_offsets.shape[1], value.shape[2] * value.shape[3]))


@attention_backward.register_fake
def _(grad_output, value, spatial_shapes, reference_points, sampling_offsets, attention_logits, reference_gradient):
    grads = [tensor.new_empty(tensor.shape) for tensor in (value, sampling_offsets, attention_logits)]
    grad_points = reference_points.new_empty(reference_points.shape) if reference_gradient else value.new_empty(0)
    return grads[0], grad_points, grads[1], grads[2]


def _save_inputs(ctx, inputs, output) -> None:
    value, ctx.spatial_shapes, reference_points, offsets, logits = inputs
    ctx.save_for_backward(value, reference_points, offsets, logits)


def _differentiate(ctx, grad_output):
    value, reference_points, offsets, logits = ctx.saved_tensors
    reference_gradient = reference_points is not None and ctx.needs_input_grad[2]
    grad_value, grad_points, grad_offsets, grad_logits = attention_backward(
        grad_output, value, ctx.spatial_shapes, reference_points, offsets, logits, reference_gradient
    )
    return grad_value, None, grad_points if reference_gradient else None, grad_offsets, grad_logits


attention.register_autograd(_differentiate, setup_context=_save_inputs)


def check(inputs: OpInputs) -> None:
    """Raise ValueError for shapes, types and devices that do not fit together; the kernels rely on it."""
    value, shapes, points, offsets, logits = inputs
    if value.dim() != 4 or offsets.dim() != 6 or logits.dim() != 5:
        raise ValueError(
            "deformable attention takes value (B, S, M, D), offsets or locations (B, Q, M, L, P, 2) and logits or "
            f"weights (B, Q, M, L, P); got {tuple(value.shape)}, {tuple(offsets.shape)}, {tuple(logits.shape)}"
        )
    B, S, M, _ = value.shape
    _, Q, _, L, P, _ = offsets.shape
    if len(shapes) != 2 * L:
        raise ValueError(f"{len(shapes) / 2:g} spatial_shapes for {L} levels of offsets or locations")
    tokens = 0
    for height, width in inputs.spatial_shapes:
        tokens += height * width if height > 0 and width > 0 else -1
    if not isinstance(tokens, int | torch.SymInt) or tokens != S:
        raise ValueError(f"spatial_shapes {shapes} are no integers that add up to the {S} tokens of value")
    _require(offsets, "offsets", (B, Q, M, L, P, 2), value)
    _require(logits, "logits", (B, Q, M, L, P), value)
    if points is not None:
        if points.dim() != 4 or points.shape[3] not in (2, 4):
            raise ValueError(f"reference_points must be (B, Q, L, 2) or (B, Q, L, 4); got {tuple(points.shape)}")
        _require(points, "reference points", (B, Q, L, points.shape[3]), value)


def _require(tensor: Tensor, name: str, shape: tuple[int, ...], value: Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(f"deformable attention: {name} of shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype not in _DTYPES or value.dtype not in _DTYPES or tensor.device != value.device:
        raise ValueError(
            f"deformable attention: {name} of {tensor.dtype} on {tensor.device}, value of {value.dtype} on "
            f"{value.device}; all must be fp32, bf16, fp16 or float64 and on one device"
        )


def _plain_forward(inputs: OpInputs) -> Tensor:
    value, _, points, offsets, logits = inputs
    if value.device.type == "cpu":
        return embedding_bag.forward(inputs)
    shapes = inputs.spatial_shapes
    with torch.autocast(value.device.type, enabled=False):
        if points is None:
            return reference.sample_and_sum(value, shapes, offsets.float(), logits.float())
        return reference.deformable_attention(value, shapes, points.float(), offsets.float(), logits.float())


def _fast_backend(device: str) -> ModuleType | None:
    """The backend that beats plain PyTorch on a device, if there is one."""
    if forced in ("cpu", "embedding_bag", "triton") and device != ("cuda" if forced == "triton" else "cpu"):
        raise RuntimeError(f"backend {forced!r} does not run on {device}; choose another with ops.use_backend")
    if forced == "embedding_bag" or device not in ("cpu", "cuda"):
        return None
    fast, plain = ("cpu", "embedding_bag") if device == "cpu" else ("triton", "reference")
    backend = library if device == "cpu" else triton_backend
    available, detail = backend.status()
    if not available and forced == fast:
        raise RuntimeError(f"backend {forced!r} is not available: {detail}")
    if available:
        _log_once(logging.INFO, fast, detail)
        return backend
    _log_once(logging.WARNING, plain, f"plain PyTorch, slower than backend {fast!r}: {detail}")
    return None


@functools.cache
def _log_once(level: int, backend: str, detail: str) -> None:
    logger.log(level, "deformable attention runs on %s (%s)", backend, detail)
