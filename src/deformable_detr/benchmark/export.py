"""Speed of exported files in their runtimes beside the model itself, on the CPU, in one process and in turn."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..export import export_model, load
from ..export.formats import SUFFIXES
from ..model.detector import DeformableDETR

EAGER = "eager"
FORMS = (("onnx", "grid_sample"), ("onnx", "gather"), ("openvino", "grid_sample"), ("openvino", "gather"),
         ("torch", "grid_sample"), ("torch", "gather"))  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One runtime and input. Milliseconds a batch; `ratio`: eager's median of the same rounds / this one's."""

    runtime: str
    sampling: str
    batch: int
    height: int
    width: int
    median_ms: float
    best_ms: float
    ratio: float


def measure(
    model: DeformableDETR,
    batches: Sequence[int] = (1, 4),
    size: tuple[int, int] | None = None,
    repeats: int = 7,
    forms: Iterable[tuple[str, str]] = FORMS,
    report: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Exports the model in each of `forms` (format, sampling) with open sizes, and times them all in turn.

    All use as many threads as PyTorch does here. Each round runs every runtime once on the same input, so what else
    goes on in the machine meets all of them; medians of `repeats` rounds are compared, after one that does not count.
    size: (height, width), none: a 4:3 image as the model's config resizes it.
    """
    model = model.cpu().float().eval()
    height, width = size or (model.config.image_size, model.config.image_size * 4 // 3)
    calls: dict[tuple[str, str], Any] = {(EAGER, "native"): model}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, sampling) in enumerate(forms):
            path = Path(folder) / f"{number}{SUFFIXES[kind]}"
            export_model(model, path, kind, sampling=sampling)  # type: ignore[arg-type]  # strings of FORMS
            calls[kind, sampling] = load(path, "cpu", threads=torch.get_num_threads())
            report(f"{kind} with {sampling}: exported and verified")
        for batch in batches:
            pixels = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
            mask = torch.zeros(batch, height, width, dtype=torch.bool)
            times: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
            with torch.inference_mode():
                for _ in range(repeats + 1):
                    for name, call in calls.items():
                        times[name].append(_timed(call, pixels, mask))
            eager = statistics.median(times[EAGER, "native"][1:])
            for (runtime, sampling), all_times in times.items():
                median = statistics.median(all_times[1:])
                rows.append(
                    Row(runtime, sampling, batch, height, width, median * 1e3, min(all_times[1:]) * 1e3, eager / median)
                )
        calls.clear()  # opened files cannot be deleted everywhere
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| runtime | sampling | batch | input | median ms | best ms | × eager |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {row.runtime} | {row.sampling} | {row.batch} | {row.height}×{row.width} "
        f"| {row.median_ms:.0f} | {row.best_ms:.0f} | {row.ratio:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def _timed(call: Any, pixels: Tensor, mask: Tensor) -> float:
    start = time.perf_counter()
    call(pixels, mask)
    return time.perf_counter() - start
