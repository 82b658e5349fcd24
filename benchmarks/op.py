"""Time deformable attention: all backends against transformers' grid_sample implementation.

    python benchmarks/op.py --batch 1 8 --json op.json

The levels are those of an image of --image-size at strides 8 to 64, with 8 heads of 32 channels and 4 points. The
encoder has one query per pixel, the decoder 300. The whole op is timed: softmax, sampling locations, sampling, sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from common import BASELINE, apply_options, finish, image_size, option_parser
from deformable_detr import ops
from deformable_detr.benchmark import peak_memory_mib, time_interleaved

HEADS, CHANNELS, POINTS, QUERIES = 8, 32, 4, 300
Levels = tuple[tuple[int, int], ...]
Op = Callable[..., Tensor]


@dataclass(frozen=True)
class Row:
    """One backend on one case. Speedups are relative to transformers in fp32; error is relative to float64."""

    case: str
    batch: int
    backend: str
    dtype: str
    forward_ms: float
    forward_speedup: float
    backward_ms: float | None  # forward and backward
    backward_speedup: float | None
    forward_mib: float | None
    backward_mib: float | None
    error: float


def make_inputs(case: str, batch: int, levels: Levels, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Return value, reference points, sampling offsets (2 pixels standard deviation) and attention logits."""
    generator = torch.Generator().manual_seed(0)
    if case == "encoder":
        centers = [
            torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1) for h, w in levels
        ]
        points = torch.cat(centers)
    else:
        points = torch.rand(QUERIES, 2, generator=generator)
    Q, L, S = len(points), len(levels), sum(h * w for h, w in levels)
    reference_points = points[None, :, None].expand(batch, Q, L, 2).contiguous()
    value = torch.randn(batch, S, HEADS, CHANNELS, generator=generator)
    offsets = torch.randn(batch, Q, HEADS, L, POINTS, 2, generator=generator) * 2
    logits = torch.randn(batch, Q, HEADS, L, POINTS, generator=generator)
    inputs = [value.to(dtype), reference_points, offsets, logits]
    if device != "cpu":  # as autocast passes them
        inputs[2:] = [t.to(dtype) for t in inputs[2:]]
    return [t.to(device) for t in inputs]


def with_backend(name: str, levels: Levels) -> Op:
    def call(value: Tensor, reference_points: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        with ops.use_backend(name):
            return ops.deformable_attention(value, levels, reference_points, offsets, logits)

    return call


def transformers_op(levels: Levels, device: str) -> Op:
    """Return transformers' module with softmax and sampling locations in front, or the same computation of ours."""
    try:
        from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention
    except ImportError:
        return with_backend("reference", levels)
    module = MultiScaleDeformableAttention()
    shapes = torch.tensor(levels, device=device)
    starts = torch.tensor([0, *(h * w for h, w in levels[:-1])], device=device).cumsum(0)

    def call(value: Tensor, reference_points: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        weights = logits.flatten(-2).softmax(-1).view_as(logits).to(value.dtype)
        locations = ops.sampling_locations(levels, reference_points, offsets).to(value.dtype)
        return module(value, shapes, list(levels), starts, locations, weights, 64)

    return call


def with_backward(op: Op) -> Callable[..., object]:
    """Return forward and backward with gradients of value, offsets and logits."""

    def call(value: Tensor, reference_points: Tensor, offsets: Tensor, logits: Tensor) -> object:
        leaves = [t.detach().requires_grad_() for t in (value, offsets, logits)]
        output = op(leaves[0], reference_points, *leaves[1:])
        gradient = torch.ones_like(output)
        return output.detach(), gradient, *torch.autograd.grad(output, leaves, gradient)

    return call


def relative_error(op: Op, inputs: list[Tensor], levels: Levels) -> float:
    """Return the maximum difference from float64 on at most 2000 queries, relative to the maximum result."""
    step = max(1, inputs[1].shape[1] // 2000)
    inputs = [inputs[0][:1], *(t[:1, ::step] for t in inputs[1:])]
    with torch.no_grad():
        exact = with_backend("reference", levels)(*(t.double() for t in inputs))
        return float((op(*inputs).double() - exact).abs().max() / exact.abs().max())


def measure(case: str, batch: int, levels: Levels, device: str, repeats: int) -> list[Row]:
    available = {backend.name for backend in ops.backends() if backend.available}
    names = ("cpu", "embedding_bag") if device == "cpu" else ("triton", "reference")
    implementations = {BASELINE: transformers_op(levels, device)}
    implementations |= {name: with_backend(name, levels) for name in names if name in available}
    dtypes = (torch.float32, torch.bfloat16)
    inputs = {dtype: make_inputs(case, batch, levels, dtype, device) for dtype in dtypes}
    keys = [(n, d) for n in implementations for d in dtypes if d == torch.float32 or device == "cuda" or n == "cpu"]
    forward = {(n, d): partial(implementations[n], *inputs[d]) for n, d in keys}
    backward = {(n, d): partial(with_backward(implementations[n]), *inputs[d]) for n, d in keys if n != "embedding_bag"}
    with torch.no_grad():
        forward_times = time_interleaved(forward, repeats)
        forward_mib = {key: peak_memory_mib(call, device) for key, call in forward.items()}
    backward_times = time_interleaved(backward, repeats)
    backward_mib = {key: peak_memory_mib(call, device) for key, call in backward.items()}
    baseline = BASELINE, torch.float32
    rows = []
    for key in keys:
        name, dtype = key
        forward_ms = forward_times[key].median_ms
        backward_ms = backward_times[key].median_ms if key in backward_times else None
        rows.append(
            Row(
                case=case,
                batch=batch,
                backend=name,
                dtype=str(dtype).removeprefix("torch."),
                forward_ms=forward_ms,
                forward_speedup=forward_times[baseline].median_ms / forward_ms,
                backward_ms=backward_ms,
                backward_speedup=backward_ms and backward_times[baseline].median_ms / backward_ms,
                forward_mib=forward_mib[key],
                backward_mib=backward_mib.get(key),
                error=relative_error(implementations[name], inputs[dtype], levels),
            )
        )
    return rows


def main() -> None:
    parser = option_parser(__doc__, repeats=7)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="images per batch")
    parser.add_argument("--image-size", type=image_size, default=(800, 1333), metavar="H,W")
    options = parser.parse_args()
    apply_options(options)
    height, width = options.image_size
    levels = tuple((-(-height // stride), -(-width // stride)) for stride in (8, 16, 32, 64))
    rows: list[Row] = []
    for case in ("encoder", "decoder"):
        for batch in options.batch:
            rows += measure(case, batch, levels, options.device, options.repeats)
    columns = {
        "case": "", "batch": "", "backend": "", "dtype": "", "forward_ms": ".2f", "forward_speedup": ".1f",
        "backward_ms": ".2f", "backward_speedup": ".1f", "forward_mib": ".0f", "backward_mib": ".0f", "error": ".0e",
    }  # fmt: skip
    finish(options, rows, columns, levels=levels, backends=[vars(backend) for backend in ops.backends()])


if __name__ == "__main__":
    main()
