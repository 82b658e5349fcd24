"""`deformable-detr benchmark predict`: the whole way from files to detections, beside the model alone."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.batching import collate
from ..data.images import read_image
from ..data.transforms import resize
from ..inference.predictor import evaluating, forward, predict_iter
from ..structures import Target
from .machine import _resident_mib
from .rounds import described, write

SAMPLE = 16  # images on which the model alone is timed, before and after


@dataclass(frozen=True)
class Result:
    """images_per_second of the whole way; model_images_per_second of the model alone, on `SAMPLE` images before and
    after; of_model: their ratio. memory_mib: of the process after each tenth of the images, Linux only.
    """

    images: int
    images_per_second: float
    model_images_per_second: float
    of_model: float
    memory_mib: list[float]


def measure(model: Any, images: Sequence[Path], batch_size: int = 1) -> Result:
    """Predicts all images; the model alone is timed on prepared batches of the first ones, twice."""
    before = _alone(model, images[:SAMPLE], batch_size)
    linux = Path("/proc/self/statm").exists()
    memory, step = [], max(1, len(images) // 10)
    start = time.perf_counter()
    for number, _ in enumerate(predict_iter(model, iter(images), batch_size=batch_size), start=1):
        if linux and number % step == 0:
            memory.append(_resident_mib())
    rate = len(images) / (time.perf_counter() - start)
    alone = statistics.mean((before, _alone(model, images[:SAMPLE], batch_size)))
    return Result(len(images), rate, alone, rate / alone, memory)


def _alone(model: Any, images: Sequence[Path], batch_size: int) -> float:
    """Images a second of the model on batches that are ready."""
    samples = []
    for path in images:
        image = resize(read_image(path), model.config.image_size, model.config.long_side)
        nothing = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), 0, (image.shape[1], image.shape[2]))
        samples.append((image, nothing))
    batches = [collate(samples[i : i + batch_size])[0] for i in range(0, len(samples), batch_size)]
    with evaluating(model):
        forward(model, batches[0])
        start = time.perf_counter()
        for batch in batches:
            forward(model, batch)["pred_boxes"].cpu()
        return len(images) / (time.perf_counter() - start)


def run(model: Any, images: Sequence[Path], batch_size: int = 1, json_path: Path | None = None) -> dict[str, Any]:
    """Measures, prints the figures and writes JSON where asked to."""
    result = measure(model, images, batch_size)
    print(
        f"{result.images} images: {result.images_per_second:.2f} images/s, the model alone "
        f"{result.model_images_per_second:.2f}: {result.of_model:.0%} of it"
    )
    if result.memory_mib:
        print("MiB after each tenth: " + ", ".join(f"{value:.0f}" for value in result.memory_mib))
    report = {**described(None), **result.__dict__}
    if json_path is not None:
        write(json_path, json.dumps(report, indent=1) + "\n")
    return report
