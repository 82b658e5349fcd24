"""`deformable-detr benchmark train`: a training step, beside transformers' model with the same weights."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config import presets
from ..config.schema import TrainConfig
from ..detector import DeformableDETR
from ..structures import ImageBatch, Target
from ..training.step import TrainStep
from ..utils.device import pick_device
from ..utils.files import write_json
from .machine import memory_peak
from .model import transformers_twin
from .rounds import BASELINE, by_allocator, described, in_turn


@dataclass(frozen=True)
class Row:
    """One way to take a step. `ratio`: transformers' fp32 median of the same rounds / this one's."""

    way: str
    precision: str
    batch: int
    height: int
    width: int
    allocator: str
    median_ms: float
    p95_ms: float
    images_per_second: float
    ratio: float | None
    memory_mib: float | None


def measure(
    preset: str,
    size: Sequence[int],
    batch: int,
    precisions: Sequence[str],
    repeats: int,
    allocator: str,
    device: str = "cpu",
    changes: dict[str, Any] | None = None,
) -> list[Row]:
    """All rows of one process: forward, matching, losses, backward, clipping and AdamW, ten objects an image."""
    torch.manual_seed(0)
    base = {"backbone_weights": "none", "backbone_norm": "frozen", "frozen_stages": 0, **(changes or {})}
    height, width = size
    pixels = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
    images = ImageBatch(pixels, torch.zeros(batch, height, width, dtype=torch.bool)).to(device)
    targets = []
    for index in range(batch):
        boxes = torch.cat((torch.rand(10, 2) * 0.6 + 0.2, torch.rand(10, 2) * 0.3 + 0.05), dim=1)
        targets.append(Target(torch.randint(0, 20, (10,)), boxes, index, (height, width)).to(device))
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for precision in precisions:
        model = DeformableDETR(presets.PRESETS[preset](**base)).train()
        if precision == precisions[0]:
            theirs = transformers_twin(model)
        model.to(device)
        if theirs is not None:
            calls[BASELINE, precision] = _their_step(theirs, model, images, targets, precision)
        stepper = TrainStep(model, TrainConfig(precision=precision))  # type: ignore[arg-type]  # of the config's names
        calls["ours", precision] = partial(stepper.step, [(images, targets)], 1, 0.5)
    times = in_turn({str(key): call for key, call in calls.items()}, repeats)
    baseline = times.get(str((BASELINE, "fp32")))
    rows = []
    for key, call in calls.items():
        found = times[str(key)]
        ratio = None if baseline is None else baseline.median_ms / found.median_ms
        rows.append(
            Row(
                key[0], key[1], batch, height, width, allocator, found.median_ms, found.p95_ms,
                batch / found.median_ms * 1e3, ratio, memory_peak(call, device),
            )
        )  # fmt: skip
    return rows


def _their_step(
    theirs: Any, model: DeformableDETR, images: ImageBatch, targets: Sequence[Target], precision: str
) -> Callable[[], object]:
    """transformers' step: its own losses, AdamW, the same clipping."""
    theirs.train().requires_grad_(True).to(images.pixels.device)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=2e-4, weight_decay=1e-4)
    labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]
    mean, std = model.get_buffer("pixel_mean"), model.get_buffer("pixel_std")

    def step() -> None:
        ready = images.normalize(mean, std)
        half = torch.autocast(ready.pixels.device.type, dtype=torch.bfloat16)
        context = half if precision == "bf16" else contextlib.nullcontext()
        with context:
            loss = theirs(ready.pixels, pixel_mask=(~ready.padding_mask).long(), labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        optimizer.step()

    return step


def run(
    preset: str = "refine",
    size: tuple[int, int] = (480, 640),
    batch: int = 1,
    precisions: Sequence[str] = ("fp32", "bf16"),
    threads: int | None = None,
    repeats: int = 3,
    json_path: Path | None = None,
    allocators: Sequence[str] = ("default", "tuned"),
    device: str = "cpu",
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures in a process for each allocator, prints a table and writes JSON where asked to.

    Raises UserError for a device that there is not.
    """
    pick_device(device)
    presets.PRESETS[preset](**(changes or {}))  # says what is wrong with them
    arguments = {
        "preset": preset, "size": list(size), "batch": batch, "precisions": list(precisions), "repeats": repeats,
        "device": device, "changes": changes,
    }  # fmt: skip
    # The C library's allocator is the CPU's matter.
    rows = by_allocator(
        "deformable_detr.benchmark.train", arguments, threads, allocators if device == "cpu" else ["default"]
    )
    report = {
        **described(threads, device),
        "preset": preset,
        "changes": changes or {},
        "repeats": repeats,
        "rows": rows,
    }
    print("| way | precision | allocator | input | median ms | p95 ms | × transformers | extra MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
        memory = "–" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}"
        print(
            f"| {row['way']} | {row['precision']} | {row['allocator']} | {batch}×3×{size[0]}×{size[1]} "
            f"| {row['median_ms']:.0f} | {row['p95_ms']:.0f} | {ratio} | {memory} |"
        )
    if json_path is not None:
        write_json(json_path, report)
    return report


if __name__ == "__main__":
    print(json.dumps([asdict(row) for row in measure(**json.loads(sys.argv[1]))]))
