"""`deformable-detr benchmark op`: all backends of the attention op side by side, each against transformers' form.

Shapes are those of an 800×1333 image: levels 100×167, 50×84, 25×42, 13×21, 8 heads of 32 channels, 4 points. The
encoder has one query a pixel, looking around itself (offsets with a standard deviation of 2 pixels); the decoder 300
queries anywhere. All ways run in one process, in turn, and medians are compared; the whole op is timed, from the linear
layers' outputs: softmax, sampling locations, sampling, sum. On CPUs the C library's memory allocator is part of every
figure, so everything is measured with its defaults and tuned (no page is given back).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..utils.device import pick_device
from ..utils.files import write_json
from .machine import Machine, memory_peak
from .rounds import BASELINE, by_allocator, described

LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))
HEADS, CHANNELS, POINTS = 8, 32, 4


@dataclass(frozen=True)
class Row:
    """One way to compute one case. Times in milliseconds, memory in MiB beyond inputs and results."""

    case: str
    batch: int
    backend: str
    dtype: str
    allocator: str
    forward_ms: float
    both_ms: float | None
    forward_ratio: float | None  # transformers' time / this time
    both_ratio: float | None
    memory_mib: float | None
    both_memory_mib: float | None
    error: float | None  # against float64, relative to the largest result
    of_limit: float | None  # the machine's own limit for the reads / this forward time


def make_inputs(case: str, batch: int, dtype: torch.dtype, device: str, queries: int | None = None) -> list[Tensor]:
    """value (dtype), reference points, offsets and logits (fp32 on CPUs, `dtype` on GPUs: what autocast gives them)."""
    random = torch.Generator().manual_seed(0)
    tokens = sum(h * w for h, w in LEVELS)
    if case == "encoder":
        centers = [
            torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1) for h, w in LEVELS
        ]
        reference = torch.cat(centers)
        reference = reference if queries is None else reference[:: max(1, tokens // queries)]
    else:
        reference = torch.rand(queries or 300, 2, generator=random)
    Q = len(reference)
    reference = reference[None, :, None].expand(batch, Q, len(LEVELS), 2).contiguous()
    value = torch.randn(batch, tokens, HEADS, CHANNELS, generator=random)
    offsets = torch.randn(batch, Q, HEADS, len(LEVELS), POINTS, 2, generator=random) * 2
    logits = torch.randn(batch, Q, HEADS, len(LEVELS), POINTS, generator=random)
    inputs = [value.to(dtype), reference, offsets, logits]
    if device != "cpu":
        inputs[2:] = [t.to(dtype) for t in inputs[2:]]
    return [t.to(device) for t in inputs]


def with_backend(name: str) -> Callable[..., Tensor]:
    def call(value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        with ops.use_backend(name):
            return ops.deformable_attention(value, LEVELS, reference, offsets, logits)

    return call


def _unfused(sample: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Softmax and locations as everybody writes them, then `sample(value, locations, weights)`."""

    def call(value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        weights = logits.flatten(-2).softmax(-1).view_as(logits)
        locations = ops.sampling_locations(LEVELS, reference, offsets)
        return sample(value, locations.to(value.dtype), weights.to(value.dtype))

    return call


def peers(device: str) -> dict[str, Callable[..., Tensor]]:
    """Other implementations that are installed: transformers' form everywhere, CUDA extensions on GPUs."""
    found: dict[str, Callable[..., Tensor]] = {}
    shapes = torch.tensor(LEVELS, device=device)
    starts = torch.tensor([0, *(h * w for h, w in LEVELS[:-1])], device=device).cumsum(0)
    try:
        from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention
    except ImportError:
        found[BASELINE] = with_backend("reference")  # the same maths
    else:
        module = MultiScaleDeformableAttention()
        found[BASELINE] = _unfused(lambda v, x, a: module(v, shapes, list(LEVELS), starts, x, a, 64))
    if device == "cuda":
        try:
            import MultiScaleDeformableAttention as official  # pyright: ignore[reportMissingImports]
        except ImportError:
            pass
        else:
            found["official"] = _unfused(lambda v, x, a: official.ms_deform_attn_forward(v, shapes, starts, x, a, 64))
        try:
            from mmcv.ops import MultiScaleDeformableAttnFunction  # pyright: ignore[reportMissingImports]
        except ImportError:
            pass
        else:
            found["mmcv"] = _unfused(
                lambda v, x, a: MultiScaleDeformableAttnFunction.apply(v, shapes, starts, x, a, 64)
            )
    return found


def ways(device: str) -> dict[str, Callable[..., Tensor]]:
    """What is measured on this device, by name; the baseline first."""
    named = {b.name: b for b in ops.backends()}
    own = ("cpu", "embedding_bag") if device == "cpu" else ("triton", "reference")
    return {**peers(device), **{name: with_backend(name) for name in own if named[name].available}}


def both(way: Callable[..., Tensor]) -> Callable[..., object]:
    """Forward and backward, with gradients of value, offsets and logits, as in a training step's encoder."""

    def call(value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> object:
        leaves = [t.detach().requires_grad_() for t in (value, offsets, logits)]
        output = way(leaves[0], reference, *leaves[1:])
        incoming = torch.ones_like(output)  # an input of the backward pass, and the output a result: neither is extra
        return output.detach(), incoming, *torch.autograd.grad(output, leaves, incoming)

    return call


def error(way: Callable[..., Tensor], case: str, dtype: torch.dtype, device: str) -> float:
    """Largest difference from float64 on some 2000 queries of the case, relative to the largest result."""
    inputs = make_inputs(case, 1, dtype, device, queries=2000 if case == "encoder" else 300)
    with ops.use_backend("reference"):
        exact = ops.deformable_attention(inputs[0].double(), LEVELS, *(t.double() for t in inputs[1:]))
    with torch.no_grad():
        found = way(*inputs).double()
    return ((found - exact).abs().max() / exact.abs().max()).item()


def _interleaved(calls: dict[str, Callable[[], object]], repeats: int, wait: Callable[[], None]) -> dict[str, float]:
    """Median milliseconds of each call, all of them run in turn; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            if turn:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(device: str, batches: list[int], repeats: int, allocator: str) -> list[Row]:
    """All rows of one device in this process, with the allocator that its environment set."""
    machine = Machine.measured(device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    rows: list[Row] = []
    for case in ("encoder", "decoder"):
        for batch in batches:
            inputs = {dtype: make_inputs(case, batch, dtype, device) for dtype in (torch.float32, torch.bfloat16)}
            forward: dict[tuple[str, torch.dtype], Callable[..., object]] = {}
            backward: dict[tuple[str, torch.dtype], Callable[..., object]] = {}
            for name, way in ways(device).items():
                for dtype in inputs:
                    if dtype == torch.bfloat16 and (device == "cpu" and name != "cpu"):
                        continue
                    forward[name, dtype] = way
                    if name != "embedding_bag":
                        backward[name, dtype] = both(way)
            with torch.no_grad():
                calls = {str(key): partial(call, *inputs[key[1]]) for key, call in forward.items()}
                forward_ms = _interleaved(calls, repeats, wait)
                memory = {key: memory_peak(call, device) for key, call in calls.items()}
            calls = {str(key): partial(call, *inputs[key[1]]) for key, call in backward.items()}
            both_ms = _interleaved(calls, max(2, repeats // 2), wait)
            both_memory = {key: memory_peak(call, device) for key, call in calls.items()}
            base = str((BASELINE, torch.float32))
            limit = machine.gather_ms(inputs[torch.float32][2].numel() // 2 * 4, CHANNELS)
            for name, dtype in forward:
                key = str((name, dtype))
                narrower = 1 if dtype == torch.float32 or device == "cpu" else 2
                slow = both_ms.get(key)
                rows.append(
                    Row(
                        case=case,
                        batch=batch,
                        backend=name,
                        dtype=str(dtype).removeprefix("torch."),
                        allocator=allocator,
                        forward_ms=forward_ms[key],
                        both_ms=slow,
                        forward_ratio=forward_ms[base] / forward_ms[key],
                        both_ratio=None if slow is None else both_ms[base] / slow,
                        memory_mib=memory[key],
                        both_memory_mib=both_memory.get(key),
                        error=error(ways(device)[name], case, dtype, device) if batch == batches[0] else None,
                        of_limit=limit / narrower / forward_ms[key],
                    )
                )
    return rows


def run(
    batches: tuple[int, ...] = (1, 8),
    threads: int | None = None,
    repeats: int = 7,
    device: str | None = None,
    json_path: str | Path | None = None,
    allocators: tuple[str, ...] = ("default", "tuned"),
) -> dict[str, Any]:
    """Measures everything, prints a table and returns (and writes) it with the machine's description.

    Each allocator setting is a process of its own. device: "cpu" or "cuda"; by default cuda where there is one.
    """
    device = pick_device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    threads = threads or torch.get_num_threads()
    arguments = {"device": device, "batches": list(batches), "repeats": repeats}
    rows = by_allocator(
        "deformable_detr.benchmark.op", arguments, threads, allocators if device == "cpu" else ("default",)
    )
    backends = [asdict(backend) for backend in ops.backends()]
    report = {**described(threads, device), "repeats": repeats, "backends": backends, "rows": rows}
    print(table(report))
    if json_path:
        write_json(Path(json_path), report)
    return report


def table(report: dict[str, Any]) -> str:
    """The report for people: times, and in brackets how many times faster than transformers' fp32 form."""

    def cell(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    machine, load = report["machine"], cell(report["load"], ".1f")
    lines = [
        f"{machine['name']}, {report['threads']} threads, torch {report['versions']['torch']}, load {load}",
        f"measured: {machine['cached_gb_s']:.0f} GB/s cached reads a thread, {machine['copy_gb_s']:.0f} GB/s copy",
        f"{'case':9}{'B':>2} {'backend':14}{'dtype':10}{'allocator':10}{'forward ms':>18}{'+ backward ms':>18}"
        f"{'extra MiB':>16}{'error':>9}{'of limit':>9}",
    ]
    for row in report["rows"]:
        forward = f"{row['forward_ms']:.2f} ({row['forward_ratio']:.1f}×)"
        backward = "–" if row["both_ms"] is None else f"{row['both_ms']:.2f} ({row['both_ratio']:.1f}×)"
        memory = f"{cell(row['memory_mib'], '.0f')} / {cell(row['both_memory_mib'], '.0f')}"
        lines.append(
            f"{row['case']:9}{row['batch']:>2} {row['backend']:14}{row['dtype']:10}{row['allocator']:10}{forward:>18}"
            f"{backward:>18}{memory:>16}{cell(row['error'], '.0e'):>9}{cell(row['of_limit'], '.0%'):>9}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps([asdict(row) for row in measure(**json.loads(sys.argv[1]))]))
