"""`deformable-detr benchmark predict`: the whole way from files to detections, beside the model alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.dataloader import collate
from ..data.transforms import resize
from ..predict.predictor import evaluating, forward, predict_iter
from ..structures import Target
from ..utils.files import write_json
from ..utils.images import read_image
from .machine import peak_resident_mib, resident_mib
from .rounds import described

PAUSES = 10
SAMPLE = 8  # images on which the model alone is timed in each pause


@dataclass(frozen=True)
class Result:
    """images_per_second of the whole way. model_images_per_second: of the model alone, timed in `PAUSES` pauses on
    `SAMPLE` of the images since the last one. of_model: their ratio.

    resident_mib, peak_mib: of the process at each pause, Linux only.
    """

    images: int
    images_per_second: float
    model_images_per_second: float
    of_model: float
    resident_mib: list[float]
    peak_mib: list[float]


def measure(model: Any, images: Sequence[Path], batch_size: int = 1) -> Result:
    """Predicts all images, and in pauses times the model alone, so that the machine's moods meet both."""
    stops = sorted({(part + 1) * len(images) // PAUSES for part in range(PAUSES)} - {0})
    for _ in predict_iter(model, iter(images[:batch_size]), batch_size=batch_size):  # not counted: first calls are slow
        pass
    resident, peak = [], []
    spent = alone = 0.0
    before, timed = 0, 0
    start = time.perf_counter()
    for number, _ in enumerate(predict_iter(model, iter(images), batch_size=batch_size), start=1):
        if number not in stops:
            continue
        spent += time.perf_counter() - start
        if sys.platform == "linux":
            resident.append(resident_mib())
            peak.append(peak_resident_mib())
        some = images[before:number][:: max(1, (number - before) // SAMPLE)][:SAMPLE]
        alone += _alone(model, some, batch_size)
        before, timed = number, timed + len(some)
        start = time.perf_counter()
    rate, alone_rate = len(images) / spent, timed / alone
    return Result(len(images), rate, alone_rate, rate / alone_rate, resident, peak)


def _alone(model: Any, images: Sequence[Path], batch_size: int) -> float:
    """Seconds of the model on batches that are ready: one at a time, or their memory would be measured too."""
    seconds = 0.0
    with evaluating(model):
        for first in range(0, len(images), batch_size):
            batch = collate([_sample(model, path) for path in images[first : first + batch_size]])[0]
            start = time.perf_counter()
            forward(model, batch)["pred_boxes"].cpu()
            seconds += time.perf_counter() - start
    return seconds


def _sample(model: Any, path: Path) -> tuple[Tensor, Target]:
    config, canvas = model.config, getattr(model, "canvas", None)
    image = resize(read_image(path), config.image_size, config.long_side, canvas, config.size_divisor)
    return image, Target.empty(0, (image.shape[1], image.shape[2]))


def run(model: Any, images: Sequence[Path], batch_size: int = 1, json_path: Path | None = None) -> dict[str, Any]:
    """Measures, prints the figures and writes JSON where asked to."""
    result = measure(model, images, batch_size)
    print(
        f"{result.images} images: {result.images_per_second:.2f} images/s, the model alone "
        f"{result.model_images_per_second:.2f}: {result.of_model:.0%} of it"
    )
    if result.peak_mib:
        print("MiB at the peak, after each tenth: " + ", ".join(f"{value:.0f}" for value in result.peak_mib))
    report = {**described(None), **result.__dict__}
    if json_path is not None:
        write_json(json_path, report)
    return report
