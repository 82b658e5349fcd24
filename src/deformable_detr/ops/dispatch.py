"""The two functions that the model calls, and the choice of what runs them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from . import gather, operators, reference, triton_backend
from .native import library

Shapes = Sequence[tuple[int, int]]
NAMES = ("cpu", "triton", "embedding_bag", "reference", "gather")
VARIABLE = "DEFORMABLE_DETR_BACKEND"
_FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """A way to compute the op: `available` here or not, and `detail`: what it is, or why it is missing."""

    name: str
    devices: str
    available: bool
    detail: str


def backends() -> list[Backend]:
    """All backends, fastest first."""
    compiled, detail = library.status()
    return [
        Backend("cpu", "cpu", compiled is not None, f"compiled library, {detail}" if compiled else detail),
        Backend("triton", "cuda", *triton_backend.status()),
        Backend("embedding_bag", "cpu", True, "plain PyTorch in chunks; gradients by the reference"),
        Backend("reference", "any", True, "plain PyTorch by grid_sample; float64, differentiable any number of times"),
        Backend("gather", "any", True, "plain PyTorch by look-up of rows; for exported graphs without grid_sample"),
    ]


def _known(name: str | None) -> str | None:
    if name is not None and name not in NAMES:
        raise ValueError(f"unknown backend {name!r}: one of {', '.join(NAMES)}")
    return name


operators.forced = _known(os.environ.get(VARIABLE) or None)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Inside, calls run on this backend (None: the best one) or raise where it is missing. Holds for all threads.

    Calls that no fast backend takes (float64, more than 64 samples or 256 channels a head) still go to the reference.
    The environment variable DEFORMABLE_DETR_BACKEND does the same for a whole process. A compiled or exported graph
    keeps the choice between "reference", "gather" and the rest that held when it was traced.
    """
    before, operators.forced = operators.forced, _known(name)
    try:
        yield
    finally:
        operators.forced = before


def _runs_as_op(value: Tensor, points: Tensor | None, offsets: Tensor, logits: Tensor) -> bool:
    """Whether a registered op takes the call; the rest goes to the reference."""
    if operators.forced in ("reference", "gather") or torch.onnx.is_in_onnx_export():
        return False
    floats = [value, offsets, logits, *([] if points is None else [points])]
    return (
        value.device.type in ("cpu", "cuda")
        and all(tensor.dtype in _FAST_DTYPES for tensor in floats)
        and offsets.shape[3] * offsets.shape[4] <= library.MAX_SAMPLES
        and value.shape[3] <= library.MAX_CHANNELS
    )


def _plain() -> Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]:
    """What computes a call that no registered op takes."""
    return gather.sample_and_sum if operators.forced == "gather" else reference.sample_and_sum


def _supported(tensor: Tensor) -> Tensor:
    """fp16 is no type of the CPU kernels: widened, exactly."""
    return tensor.float() if tensor.dtype == torch.float16 and tensor.device.type == "cpu" else tensor


def _check(value: Tensor, shapes: Shapes, points: Tensor | None, offsets: Tensor, logits: Tensor) -> None:
    if value.dim() != 4 or offsets.dim() != 6 or logits.dim() != 5 or offsets.shape[-1] != 2:
        raise ValueError(
            "deformable attention takes value (B, S, M, D), offsets or locations (B, Q, M, L, P, 2) and logits or "
            f"weights (B, Q, M, L, P); got {tuple(value.shape)}, {tuple(offsets.shape)}, {tuple(logits.shape)}"
        )
    if points is not None and (points.dim() != 4 or points.shape[-1] not in (2, 4)):
        raise ValueError(f"reference_points must be (B, Q, L, 2) or (B, Q, L, 4); got {tuple(points.shape)}")
    if len(shapes) != offsets.shape[3]:
        raise ValueError(f"{len(shapes)} spatial_shapes for {offsets.shape[3]} levels of offsets or locations")


def deformable_attention(
    value: Tensor,
    spatial_shapes: Shapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Multi-scale deformable attention (equation 3) from the raw outputs of the linear layers: (B, Q, M·D).

    Softmax over L × P, sampling locations, bilinear sampling and the weighted sum are one pass on the fast backends:
    neither locations nor samples are ever stored.

    value: (B, S, M, D), tokens of all levels in the order of `spatial_shapes`, each row by row; the rows of padding are
        zero. fp32, bf16, fp16 (sums in fp32) or float64.
    spatial_shapes: (height, width) of each level, Python numbers; they must add up to S.
    reference_points: (B, Q, L, 2) points in 0..1, offsets then count in pixels of the level, or (B, Q, L, 4) boxes
        (cx, cy, w, h), offsets then count in halves of the box, spread over the points (appendix A.4). Best in fp32.
    sampling_offsets: (B, Q, M, L, P, 2) as (x, y).
    attention_logits: (B, Q, M, L, P), before the softmax.

    Outside a map there is zero, and so there is at a location that is not a number. ValueError: shapes that do not fit.
    """
    _check(value, spatial_shapes, reference_points, sampling_offsets, attention_logits)
    if not _runs_as_op(value, reference_points, sampling_offsets, attention_logits):
        return reference.deformable_attention(
            value, spatial_shapes, reference_points, sampling_offsets, attention_logits, _plain()
        )
    flat = [side for shape in spatial_shapes for side in shape]
    return operators.deformable_attention(
        _supported(value), flat, reference_points.float(), _supported(sampling_offsets), _supported(attention_logits)
    ).to(value.dtype)


def sample_and_sum(
    value: Tensor, spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Bilinear samples of `value` at the locations, summed by the weights: (B, Q, M·D), the official op's meaning.

    value, spatial_shapes: as in `deformable_attention`.
    sampling_locations: (B, Q, M, L, P, 2), (x, y) in 0..1 of each level's map; best in fp32.
    attention_weights: (B, Q, M, L, P).
    """
    _check(value, spatial_shapes, None, sampling_locations, attention_weights)
    if not _runs_as_op(value, None, sampling_locations, attention_weights):
        return _plain()(value, spatial_shapes, sampling_locations, attention_weights)
    flat = [side for shape in spatial_shapes for side in shape]
    return operators.sample_and_sum(
        _supported(value), flat, sampling_locations.float(), _supported(attention_weights)
    ).to(value.dtype)
