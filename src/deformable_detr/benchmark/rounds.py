"""What the benchmarks of model and training share: rounds in turn, allocators, the report and its picture."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..utils.errors import UserError
from .machine import Machine, gemm_gflops

BASELINE = "transformers"
PAUSE = 0.1  # seconds: threads of what ran before give up waiting for more; without, OpenVINO was a fifth slower
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}


@dataclass(frozen=True)
class Times:
    """Milliseconds of all rounds but the first."""

    median_ms: float
    p95_ms: float
    best_ms: float


def in_turn(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """Each round runs every call once, so what else goes on in the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    gc.collect()
    gc.freeze()  # what is there already: opened .pt2 files are millions of objects, seconds for each collection
    try:
        for turn in range(repeats + 1):
            for name, call in calls.items():
                gc.collect()
                wait()
                time.sleep(PAUSE)
                start = time.perf_counter()
                call()
                wait()
                if turn:
                    times[name].append((time.perf_counter() - start) * 1e3)
    finally:
        gc.unfreeze()
    return {name: Times(statistics.median(v), _percentile(v, 0.95), min(v)) for name, v in times.items()}


def _percentile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(part * (len(ordered) - 1)))]


def by_allocator(module: str, arguments: Mapping[str, Any], threads: int | None, allocators: Sequence[str]) -> list:
    """Rows that `python -m module ARGUMENTS` prints as JSON, in a process for each setting of the allocator."""
    rows = []
    for allocator in allocators:
        environment = {**os.environ, **(TUNED if allocator == "tuned" else {})}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        command = [sys.executable, "-m", module, json.dumps({**arguments, "allocator": allocator})]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"the process that measures ended with code {done.returncode}; what it said is above")
        rows += json.loads(done.stdout.splitlines()[-1])
    return rows


def described(threads: int | None, device: str = "cpu") -> dict[str, Any]:
    """The machine, what it can do at most, and the versions: no host names, no paths."""
    if threads is not None:
        torch.set_num_threads(threads)
    packages = ("torch", "timm", "transformers", "onnxruntime", "openvino", "nncf")
    versions = {name: _version(name) for name in packages}
    return {
        "machine": asdict(Machine.measured(device)),
        "gemm_gflops": {"fp32": gemm_gflops(torch.float32, device), "bf16": gemm_gflops(torch.bfloat16, device)},
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version},
        "commit": _commit(),
        "command": " ".join(["deformable-detr", *(Path(w).name if w.startswith("/") else w for w in sys.argv[1:])]),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    folder = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


_COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e")


def bars(title: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """An SVG of stacked bars: for each row its parts in milliseconds, in the order they run."""
    parts = list(dict.fromkeys(part for values in rows.values() for part in values))
    colors = dict(zip(parts, (_COLORS * 2)[: len(parts)], strict=True))
    longest = max(sum(values.values()) for values in rows.values())
    width, left, high = 760, 190, 30
    lines = [f'<text x="10" y="22" font-size="15">{title}</text>']
    for number, (name, values) in enumerate(rows.items()):
        y, x = 40 + number * (high + 12), float(left)
        lines.append(f'<text x="10" y="{y + 20}">{name}</text>')
        for part, milliseconds in values.items():
            length = milliseconds / longest * (width - left - 90)
            tip = f"<title>{part}: {milliseconds:.1f} ms</title>"
            shape = f'x="{x:.1f}" y="{y}" width="{length:.1f}" height="{high}" fill="{colors[part]}"'
            lines.append(f"<rect {shape}>{tip}</rect>")
            if length > 40:  # room for the number
                lines.append(
                    f'<text x="{x + length / 2:.1f}" y="{y + 20}" text-anchor="middle">{milliseconds:.0f}</text>'
                )
            x += length
        lines.append(f'<text x="{x + 6:.1f}" y="{y + 20}">{sum(values.values()):.0f} ms</text>')
    y = 40 + len(rows) * (high + 12) + 14
    for number, part in enumerate(parts):
        x = 10 + number % 6 * 125
        row = y + number // 6 * 22
        lines.append(f'<rect x="{x}" y="{row - 11}" width="12" height="12" fill="{colors[part]}"/>')
        lines.append(f'<text x="{x + 18}" y="{row}">{part}</text>')
    height = y + (len(parts) - 1) // 6 * 22 + 16
    font = 'font-family="sans-serif" font-size="13"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {font}>'
    return "\n".join([start, f'<rect width="{width}" height="{height}" fill="white"/>', *lines, "</svg>\n"])
