"""Measure one model in every variant that runs on this machine: latency, throughput, peak memory and AP."""

import gc
import importlib.metadata
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from .config.image_size import typical_input_size
from .evaluation import evaluate
from .evaluation.evaluator import EvalOptions
from .export import ExportOptions, export_model, load_exported
from .ops.native import library
from .predict.predictor import Detector
from .runtimes.fused.onednn import has_bf16
from .utils.errors import UserError
from .utils.process import malloc_trim
from .utils.progress import progress_bar

K = TypeVar("K")
PAUSE = 0.1  # seconds before each call: threads of the previous runtime stop spinning, and OpenVINO is a fifth faster


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call over all rounds except the first."""

    median_ms: float
    p95_ms: float


@dataclass(frozen=True)
class BenchmarkRow:
    """One variant of the model."""

    runtime: str  # "eager", "optimized", "onnx" or "openvino"
    precision: str  # "fp32", "bf16" or "int8"
    median_ms: float  # latency of one batch
    p95_ms: float
    images_per_second: float  # at the median latency
    speedup: float  # median latency of the eager model divided by this one's
    peak_mib: float | None  # of a call in addition to weights and results; None: unknown, as in other runtimes
    ap: float | None  # COCO AP, 0 to 1, if a dataset was given


def benchmark(
    model: Detector,
    data: str | os.PathLike[str] | None = None,
    *,
    batch_size: int = 1,
    image_size: tuple[int, int] | None = None,
    repeats: int = 7,
    split: str = "val",
    limit: int | None = None,
    report: Callable[[str], None] | None = None,
) -> list[BenchmarkRow]:
    """Measure a model as eager, optimized, bf16, ONNX Runtime, OpenVINO and int8, as far as they are available.

    All variants run in this process, interleaved, on the same random input with as many threads as PyTorch uses.

    Args:
        model: On the CPU or a GPU. Exported files are measured on the CPU only.
        data: Dataset to measure AP on. int8 is calibrated on its train split and omitted without a dataset.
        batch_size: Images per batch.
        image_size: (height, width). Default: the model's size for a 4:3 image.
        repeats: Rounds after the first one.
        split: Split that AP is measured on.
        limit: Number of images that AP is measured on.
        report: Called with one line per finished step; steps that run are shown too. If omitted, nothing is shown.
    """
    progress, report = report is not None, report or (lambda line: None)
    device = model.get_buffer("pixel_mean").device
    height, width = (image_size and model.export_size(image_size)) or typical_input_size(model.resize_rule)
    with tempfile.TemporaryDirectory() as folder:
        variants: dict[tuple[str, str], Any] = {
            ("eager", "fp32"): model.eval(),
            ("optimized", "fp32"): model.optimize(),
        }
        if has_bf16() or device.type == "cuda":
            variants["optimized", "bf16"] = model.optimize("bf16")
        if device.type == "cpu":
            fixed = None if model.exports_any_size else (height, width)
            export = ExportOptions(image_size=fixed, data=data, split=split, limit=limit)
            variants |= _exported_variants(model, Path(folder), export, report, progress)
        pixels = torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
        mask = torch.zeros(batch_size, height, width, dtype=torch.bool, device=device)
        calls = {variant: partial(detector, pixels, mask) for variant, detector in variants.items()}
        with torch.inference_mode(), progress_bar(repeats + 1, "rounds", "time", progress, keep=False) as bar:
            timings = time_interleaved(calls, repeats, bar.update)
            measurable = [variant for variant in calls if variant[0] in ("eager", "optimized")]
            peaks = {variant: peak_memory_mib(calls[variant], device.type) for variant in measurable}
        report("timed")
        options = EvalOptions(batch_size=1, limit=limit, progress=progress)
        aps = {variant: _measure_ap(detector, data, split, options) for variant, detector in variants.items()}
        calls.clear()  # with `variants`, closes the files, which Windows cannot delete while they are open
        variants.clear()
    eager_ms = timings["eager", "fp32"].median_ms
    return [
        BenchmarkRow(
            *variant, timing.median_ms, timing.p95_ms, batch_size / timing.median_ms * 1e3, eager_ms / timing.median_ms,
            peaks.get(variant), aps[variant],
        )
        for variant, timing in timings.items()
    ]  # fmt: skip


def _measure_ap(detector: Any, data: str | os.PathLike[str] | None, split: str, options: EvalOptions) -> float | None:
    return None if data is None else evaluate(detector, data, split=split, **options)["AP"]


def _exported_variants(
    model: Detector, folder: Path, options: ExportOptions, report: Callable[[str], None], progress: bool
) -> dict[tuple[str, str], Any]:
    """Export the model to each installed runtime and open the files."""
    variants: dict[tuple[str, str], Any] = {}
    has_int8 = options.data is not None and model.int8_modules and find_spec("nncf")
    precisions: tuple[Literal["fp32", "int8"], ...] = ("fp32", "int8") if has_int8 else ("fp32",)
    packages: dict[Literal["onnx", "openvino"], str] = {"onnx": "onnxruntime", "openvino": "openvino"}
    for to, package in packages.items():
        if not all(map(find_spec, ("onnx", "onnxscript", package))):
            report(f"{package} is not measured: pip install 'deformable-detr[export]'")
            continue
        for precision in precisions:
            path = folder / f"{precision}{'.onnx' if to == 'onnx' else '.xml'}"
            chosen = replace(options, precision=precision, data=options.data if precision == "int8" else None)
            try:
                export_model(model, path, to, chosen, progress=progress)
            except UserError as error:
                report(f"{to} {precision} is not measured: {error}")
                continue
            variants[to, precision] = load_exported(path, "cpu", threads=torch.get_num_threads())
            report(f"exported to {to}, {precision}")
    return variants


def table(rows: Sequence[BenchmarkRow]) -> str:
    """Format rows as a Markdown table."""
    lines = ["| runtime | precision | median ms | p95 ms | images/s | speedup | peak MiB | AP |", "|---" * 8 + "|"]
    for row in rows:
        peak = "–" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        ap = "–" if row.ap is None else f"{row.ap:.3f}"
        lines.append(
            f"| {row.runtime} | {row.precision} | {row.median_ms:.1f} | {row.p95_ms:.1f} "
            f"| {row.images_per_second:.2f} | {row.speedup:.2f}× | {peak} | {ap} |"
        )
    return "\n".join(lines)


def time_interleaved(
    calls: Mapping[K, Callable[[], object]], repeats: int, on_round: Callable[[], object] = lambda: None
) -> dict[K, Timing]:
    """Run every call once per round, so that other load on the machine affects all of them alike.

    `on_round` is called after each of the `repeats` + 1 rounds.
    """
    times: dict[K, list[float]] = {name: [] for name in calls}
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    gc.collect()
    gc.freeze()  # an opened .pt2 file has millions of objects, which take seconds per collection
    try:
        for turn in range(repeats + 1):
            for name, call in calls.items():
                gc.collect()
                synchronize()
                time.sleep(PAUSE)
                start = time.perf_counter()
                call()
                synchronize()
                if turn:
                    times[name].append((time.perf_counter() - start) * 1e3)
            on_round()
    finally:
        gc.unfreeze()
    return {name: Timing(statistics.median(ms), sorted(ms)[round(0.95 * (len(ms) - 1))]) for name, ms in times.items()}


def resident_mib() -> float:
    """Return the memory of this process (Linux only)."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_memory_mib(call: Callable[[], object], device: str) -> float | None:
    """Return the peak memory of a call in addition to what exists before it and what it returns. None: unknown."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20 - _size_mib(result)
    if sys.platform != "linux":
        return None
    library.release_scratch()
    malloc_trim()
    before, peak, done = resident_mib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, resident_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = call()
        peak = max(peak, resident_mib())
    finally:
        done.set()
        watcher.join()
    return max(0.0, peak - before - _size_mib(result))


def _size_mib(result: object) -> float:
    values = result.values() if isinstance(result, dict) else result if isinstance(result, tuple | list) else [result]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor)) / 2**20


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Return processor, threads, load and versions, without host names and paths."""
    packages = ("torch", "timm", "transformers", "onnxruntime", "openvino", "nncf")
    installed = {name: importlib.metadata.version(name) for name in packages if find_spec(name)}
    return {
        "processor": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": installed,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
