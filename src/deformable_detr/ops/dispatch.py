"""The public functions, and the choice of the backend that runs them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import gather, operators, reference, triton_backend
from .native import library
from .reference import OpInputs, Shapes

NAMES = ("cpu", "triton", "embedding_bag", "reference", "gather")
_FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """A way to compute the op; `detail` says what it is, or why it is not available on this machine."""

    name: str
    devices: str  # "cpu", "cuda" or "any"
    available: bool
    detail: str


def backends() -> list[Backend]:
    """List all backends, fastest first."""
    compiled, detail = library.status()
    return [
        Backend("cpu", "cpu", compiled is not None, detail),
        Backend("triton", "cuda", *triton_backend.status()),
        Backend("embedding_bag", "cpu", True, "plain PyTorch in chunks; gradients by grid_sample"),
        Backend("reference", "any", True, "plain PyTorch by grid_sample; float64, forward mode and higher derivatives"),
        Backend("gather", "any", True, "plain PyTorch by index_select; for exported graphs without grid_sample"),
    ]


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run all calls in this context, in all threads, on one backend.

    The environment variable DEFORMABLE_DETR_BACKEND does the same for a whole process. Calls that no fast backend
    supports (float64, L · P over 64, D over 256) still run on the reference. A compiled or exported graph keeps the
    choice between "reference", "gather" and the others that it was traced with.

    Args:
        name: A name from `backends`. None: the fastest one.

    Raises:
        ValueError: There is no backend of this name.
        RuntimeError: By calls in the context, if the backend is not available or does not run on their device.
    """
    previous, operators.forced = operators.forced, _checked_name(name)
    try:
        yield
    finally:
        operators.forced = previous


def deformable_attention(
    value: Tensor, spatial_shapes: Shapes, reference_points: Tensor, sampling_offsets: Tensor, attention_logits: Tensor
) -> Tensor:
    """Compute multi-scale deformable attention (arXiv 2010.04159, equation 3) without its linear layers.

    For query q and head m, with the softmax A over all L · P points:

        out[q, m] = Σ_l Σ_p A[q, m, l, p] · value_l(reference[q, l] + offset[q, m, l, p])

    The fast backends compute softmax, locations, bilinear samples and sum in one pass and store none of them.

    Args:
        value: (B, S, M, D), the tokens of all levels, level after level and row by row; padding is zero.
            fp32, bf16, fp16 (all summed in fp32) or float64.
        spatial_shapes: (height, width) per level as Python integers; their areas sum to S.
        reference_points: (B, Q, L, 2) points or (B, Q, L, 4) boxes (cx, cy, w, h) in 0..1 of each level's map,
            preferably fp32.
        sampling_offsets: (B, Q, M, L, P, 2) as (x, y): in pixels of the level for points; for boxes in units of half
            the box divided by P (appendix A.4).
        attention_logits: (B, Q, M, L, P).

    Returns:
        (B, Q, M·D) of `value`'s dtype. Samples outside the map or at NaN are zero.

    Raises:
        ValueError: Shapes, types or devices do not fit together.
    """
    inputs = OpInputs(value, _flat(spatial_shapes), reference_points, sampling_offsets, attention_logits)
    operators.check(inputs)
    if not _runs_as_op(inputs):
        return reference.deformable_attention(
            value, spatial_shapes, reference_points, sampling_offsets, attention_logits, _plain()
        )
    return _run(inputs, reference_points.float(), _supported(sampling_offsets))


def sample_and_sum(
    value: Tensor, spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sum bilinear samples of `value` by given weights: the official `MSDeformAttnFunction` (equation 3).

    Args:
        value: (B, S, M, D), as for `deformable_attention`.
        spatial_shapes: (height, width) per level.
        sampling_locations: (B, Q, M, L, P, 2), (x, y) in 0..1 of each level's map, preferably fp32.
        attention_weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M·D) of `value`'s dtype. Samples outside the map or at NaN are zero.

    Raises:
        ValueError: Shapes, types or devices do not fit together.
    """
    inputs = OpInputs(value, _flat(spatial_shapes), None, sampling_locations, attention_weights)
    operators.check(inputs)
    if not _runs_as_op(inputs):
        return _plain()(value, spatial_shapes, reference.widened(sampling_locations), attention_weights)
    return _run(inputs, None, sampling_locations.float())


def _run(inputs: OpInputs, points: Tensor | None, offsets: Tensor) -> Tensor:
    value, logits = _supported(inputs.value), _supported(inputs.logits)
    return operators.attention(value, inputs.shapes, points, offsets, logits).to(inputs.value.dtype)


def _supported(tensor: Tensor) -> Tensor:
    """Widen fp16, which the CPU kernels do not read."""
    return tensor.float() if tensor.dtype == torch.float16 and tensor.device.type == "cpu" else tensor


def _runs_as_op(inputs: OpInputs) -> bool:
    forward_mode = forward_ad._current_level >= 0  # custom operators have no tangents
    if operators.forced in ("reference", "gather") or torch.onnx.is_in_onnx_export() or forward_mode:
        return False
    value, _, points, offsets, logits = inputs
    floats = [value, offsets, logits, *([] if points is None else [points])]
    return (
        value.device.type in ("cpu", "cuda")
        and all(tensor.dtype in _FAST_DTYPES for tensor in floats)
        and offsets.shape[3] * offsets.shape[4] <= library.MAX_SAMPLES
        and value.shape[3] <= library.MAX_CHANNELS
    )


def _plain() -> Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]:
    return gather.sample_and_sum if operators.forced == "gather" else reference.sample_and_sum


def _flat(spatial_shapes: Shapes) -> list[int]:
    """Return height, width, height, width, … of all levels. Sides are symbolic in an exported graph."""
    try:
        return [side for height, width in spatial_shapes for side in (height, width)]
    except (TypeError, ValueError):
        raise ValueError(f"spatial_shapes must be (height, width) per level, not {spatial_shapes}") from None


def _checked_name(name: str | None) -> str | None:
    if name is not None and name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; choose from {', '.join(NAMES)}")
    return name


operators.forced = _checked_name(os.environ.get("DEFORMABLE_DETR_BACKEND") or None)
