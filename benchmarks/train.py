"""Time a training step against transformers' model with the same weights.

    python benchmarks/train.py --image-size 320,416 --json train.json

A step is forward, matching, losses, backward, gradient clipping and AdamW, with ten objects per image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from common import BASELINE, add_comparison_options, apply_options, finish, option_parser, random_model
from common import transformers_twin as make_twin
from deformable_detr import DeformableDETR
from deformable_detr.benchmark import peak_memory_mib, time_interleaved
from deformable_detr.config.schema import TrainConfig
from deformable_detr.structures import ImageBatch, Target
from deformable_detr.training.step import TrainStep

OBJECTS, CLASSES = 10, 20


@dataclass(frozen=True)
class Row:
    """One implementation. Speedup is relative to transformers' fp32 median."""

    implementation: str
    precision: str
    batch: int
    height: int
    width: int
    median_ms: float
    p95_ms: float
    images_per_second: float
    speedup: float | None
    peak_mib: float | None


def make_batch(batch: int, size: tuple[int, int], device: str) -> tuple[ImageBatch, list[Target]]:
    """Return noise images and random boxes."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, generator=generator)
    images = ImageBatch(pixels, torch.zeros(batch, *size, dtype=torch.bool)).to(device)
    targets = []
    for index in range(batch):
        centers, sides = torch.rand(2, OBJECTS, 2, generator=generator)
        boxes = torch.cat((centers * 0.6 + 0.2, sides * 0.3 + 0.05), dim=1)
        labels = torch.randint(0, CLASSES, (OBJECTS,), generator=generator)
        targets.append(Target(labels.to(device), boxes.to(device), index, size))
    return images, targets


def transformers_step(
    twin: Any, model: DeformableDETR, images: ImageBatch, targets: Sequence[Target], precision: str
) -> Callable[[], object]:
    """Return a step with transformers' losses, AdamW and the same clipping."""
    twin.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=2e-4, weight_decay=1e-4)
    labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]
    mean, std = model.get_buffer("pixel_mean"), model.get_buffer("pixel_std")
    device_type = images.pixels.device.type

    def step() -> None:
        batch = images.normalize(mean, std)
        bf16 = torch.autocast(device_type, dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        with bf16:
            loss = twin(batch.pixels, pixel_mask=(~batch.padding_mask).long(), labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizer.step()

    return step


def main() -> None:
    parser = option_parser(__doc__, repeats=3)
    add_comparison_options(parser, (480, 640))
    parser.add_argument("--batch-size", type=int, default=1)
    options = parser.parse_args()
    apply_options(options)
    images, targets = make_batch(options.batch_size, options.image_size, options.device)
    twin = make_twin(random_model(options, frozen_stages=0, num_classes=CLASSES))
    steps: dict[tuple[str, str], Callable[[], object]] = {}
    for precision in options.precision:
        model = random_model(options, frozen_stages=0, num_classes=CLASSES).train()
        if twin is not None:
            steps[BASELINE, precision] = transformers_step(twin, model, images, targets, precision)
        train_step = TrainStep(model, TrainConfig(precision=precision))
        steps["ours", precision] = partial(train_step.step, [(images, targets)], 1, 0.5)
    timings = time_interleaved(steps, options.repeats)
    baseline = timings.get((BASELINE, "fp32"))
    height, width = options.image_size
    rows = []
    for (implementation, precision), step in steps.items():
        timing = timings[implementation, precision]
        row = Row(
            implementation, precision, options.batch_size, height, width, timing.median_ms, timing.p95_ms,
            options.batch_size / timing.median_ms * 1e3,
            None if baseline is None else baseline.median_ms / timing.median_ms,
            peak_memory_mib(step, options.device),
        )  # fmt: skip
        rows.append(row)
    columns = {
        "implementation": "", "precision": "", "batch": "", "height": "", "width": "", "median_ms": ".0f",
        "p95_ms": ".0f", "images_per_second": ".2f", "speedup": ".2f", "peak_mib": ".0f",
    }  # fmt: skip
    finish(options, rows, columns, preset=options.preset, config=options.config)


if __name__ == "__main__":
    main()
