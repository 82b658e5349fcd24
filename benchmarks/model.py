"""Time the detector: the model and its optimized variants against transformers' model with the same weights.

    python benchmarks/model.py --image-size 480,640 800,1333 --json model.json --figure parts.svg

All variants run interleaved in one process. `error` is the maximum difference of boxes (0 to 1) from the model's.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import BASELINE, add_comparison_options, apply_options, finish, option_parser, random_model
from common import transformers_twin as make_twin
from deformable_detr import DeformableDETR
from deformable_detr.benchmark import peak_memory_mib, time_interleaved
from deformable_detr.runtimes.fused.onednn import has_bf16

RUNTIMES = {"onnxruntime": ("onnx", "model.onnx"), "openvino": ("openvino", "model.xml")}
PARTS = {  # module names in our model, its optimized variant and transformers'
    "backbone": ("backbone", "model.backbone"),
    "projections": ("projections", "input_proj", "model.input_proj"),
    "encoder": ("encoder", "model.encoder"),
    "proposals": ("proposals",),
    "decoder": ("decoder", "model.decoder"),
    "heads": ("decoder.heads", "decoder.classes", "decoder.boxes", "class_embed", "bbox_embed"),
}


@dataclass(frozen=True)
class Row:
    """One variant on one input. Speedup is relative to transformers' fp32 median."""

    variant: str
    precision: str
    batch: int
    height: int
    width: int
    median_ms: float
    p95_ms: float
    images_per_second: float
    speedup: float | None
    peak_mib: float | None
    error: float
    parts_ms: dict[str, float]


class PartTimer:
    """A call that records the time of each part of a module; a part inside another one is not counted twice."""

    def __init__(self, call: Callable[[], Any], module: nn.Module) -> None:
        modules = dict(module.named_modules())
        self.call = call
        self.parts = {
            part: [leaf for name in names if name in modules for leaf in _callable_modules(modules[name])]
            for part, names in PARTS.items()
        }
        self.records: list[dict[str, float]] = []
        self.synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def __call__(self) -> Any:
        times = {part: 0.0 for part, modules in self.parts.items() if modules}
        stack: list[list[float]] = []  # start, and the time of inner parts

        def enter(*_: Any) -> None:
            self.synchronize()
            stack.append([time.perf_counter(), 0.0])

        def leave(part: str, *_: Any) -> None:
            self.synchronize()
            start, inner = stack.pop()
            duration = time.perf_counter() - start
            times[part] += (duration - inner) * 1e3
            if stack:
                stack[-1][1] += duration

        hooks = []
        for part, modules in self.parts.items():
            for module in modules:
                hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(partial(leave, part))]
        start = time.perf_counter()
        try:
            result = self.call()
            self.synchronize()
        finally:
            total = (time.perf_counter() - start) * 1e3
            for hook in hooks:
                hook.remove()
        self.records.append({**times, "rest": max(0.0, total - sum(times.values()))})
        return result

    def medians(self, rounds: int) -> dict[str, float]:
        latest = self.records[-rounds:]
        return {part: statistics.median(record[part] for record in latest) for part in latest[0]}


def _callable_modules(module: nn.Module) -> list[nn.Module]:
    return list(module.children()) if isinstance(module, nn.ModuleList) else [module]


def make_variants(model: DeformableDETR, options: Any, folder: Path) -> dict[tuple[str, str], Any]:
    """Return the modules to measure by variant and precision."""
    variants: dict[tuple[str, str], Any] = {("model", "fp32"): model}
    twin = make_twin(model)
    if twin is not None:
        variants = {(BASELINE, "fp32"): twin, **variants}
    for precision in options.precision:
        if precision == "bf16" and not (has_bf16() or options.device == "cuda"):
            continue
        variants["optimized", precision] = model.optimize(precision)
        if "compiled" in options.also:
            variants["compiled", precision] = model.optimize(precision, compile=True)
    for runtime in options.also:
        if runtime in RUNTIMES:
            from deformable_detr.export import export_model, load_exported

            to, name = RUNTIMES[runtime]
            export_model(model, folder / name, to)  # type: ignore[arg-type]
            variants[runtime, "fp32"] = load_exported(folder / name, "cpu", threads=torch.get_num_threads())
    return variants


def boxes_of(variant: tuple[str, str], module: Any, pixels: Tensor, mask: Tensor) -> Tensor:
    if variant[0] == BASELINE:
        return module(pixels, pixel_mask=(~mask).long()).pred_boxes
    return module(pixels, mask)["pred_boxes"]


def measure(variants: dict[tuple[str, str], Any], batch: int, size: tuple[int, int], options: Any) -> list[Row]:
    pixels = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(options.device)
    mask = torch.zeros(batch, *size, dtype=torch.bool, device=options.device)
    calls = {variant: partial(boxes_of, variant, module, pixels, mask) for variant, module in variants.items()}
    timings = time_interleaved(calls, options.repeats)
    timers = {
        variant: PartTimer(calls[variant], variants[variant])
        for variant in variants
        if variant[0] in (BASELINE, "model", "optimized")
    }
    time_interleaved(timers, options.repeats)
    expected = calls["model", "fp32"]().cpu()
    baseline = timings.get((BASELINE, "fp32"))
    rows = []
    for variant, call in calls.items():
        median_ms = timings[variant].median_ms
        rows.append(
            Row(
                variant=variant[0],
                precision=variant[1],
                batch=batch,
                height=size[0],
                width=size[1],
                median_ms=median_ms,
                p95_ms=timings[variant].p95_ms,
                images_per_second=batch / median_ms * 1e3,
                speedup=None if baseline is None else baseline.median_ms / median_ms,
                # Other runtimes keep their buffers.
                peak_mib=None if variant[0] in RUNTIMES else peak_memory_mib(call, options.device),
                error=float((call().cpu() - expected).abs().max()),
                parts_ms=timers[variant].medians(options.repeats) if variant in timers else {},
            )
        )
    return rows


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Draw the median time of each part as stacked bars."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.parts_ms][::-1]
    figure = Figure(figsize=(8, 0.6 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for part in (*PARTS, "rest"):
        widths = [row.parts_ms.get(part, 0.0) for row in rows]
        axes.barh([f"{row.variant} {row.precision}" for row in rows], widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel("median ms")
    axes.set_title(title, fontsize=11)
    axes.legend(ncols=4, fontsize=8, frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = option_parser(__doc__, repeats=5)
    add_comparison_options(parser, [(480, 640), (800, 1333)], nargs="+")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="images per batch")
    parser.add_argument("--also", nargs="+", choices=("compiled", *RUNTIMES), default=[], help="further variants")
    parser.add_argument("--figure", type=Path, help="SVG or PNG file: time by part at the largest size")
    options = parser.parse_args()
    apply_options(options)
    model = random_model(options)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        variants = make_variants(model, options, Path(folder))
        with torch.inference_mode():
            for size in options.image_size:
                for batch in options.batch:
                    rows += measure(variants, batch, size, options)
        variants.clear()
    columns = {
        "variant": "", "precision": "", "batch": "", "height": "", "width": "", "median_ms": ".0f", "p95_ms": ".0f",
        "images_per_second": ".2f", "speedup": ".2f", "peak_mib": ".0f", "error": ".0e",
    }  # fmt: skip
    finish(options, rows, columns, preset=options.preset, parameters=sum(p.numel() for p in model.parameters()))
    if options.figure is not None:
        height, width = max(options.image_size, key=lambda size: size[0] * size[1])
        batch = options.batch[0]
        shown = [row for row in rows if (row.batch, row.height, row.width) == (batch, height, width)]
        draw(shown, f"{options.preset}, {batch}×3×{height}×{width}, {options.allocator} allocator", options.figure)


if __name__ == "__main__":
    main()
