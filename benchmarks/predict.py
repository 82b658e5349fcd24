"""Time prediction from image files to detections against the model alone, and record the memory.

python benchmarks/predict.py runs/cards IMAGES --allocator tuned --json predict.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import apply_options, finish, option_parser
from deformable_detr.benchmark import resident_mib
from deformable_detr.data.dataloader import collate
from deformable_detr.data.transforms import resize
from deformable_detr.detector import load_detector
from deformable_detr.predict.predictor import evaluating, folder_images, forward, predict_iter
from deformable_detr.structures import Target
from deformable_detr.utils.images import read_image

PAUSES, SAMPLES = 10, 8  # the model alone is timed in ten pauses, on eight of the images since the last one


@dataclass(frozen=True)
class Row:
    """Throughput in images per second, and resident memory at each pause (Linux only)."""

    images: int
    predict_per_second: float
    model_per_second: float
    ratio: float
    resident_mib: list[float]


def model_seconds(model: Any, paths: Sequence[Path], batch_size: int) -> float:
    """Return the time of the model on batches that are already in memory."""
    seconds = 0.0
    with evaluating(model):
        for first in range(0, len(paths), batch_size):
            samples = []
            for path in paths[first : first + batch_size]:
                image = resize(read_image(path), model.resize_rule)
                samples.append((image, Target.empty(0, (image.shape[1], image.shape[2]))))
            batch = collate(samples)[0]
            start = time.perf_counter()
            forward(model, batch)["pred_boxes"].cpu()
            seconds += time.perf_counter() - start
    return seconds


def measure(model: Any, paths: Sequence[Path], batch_size: int) -> Row:
    stops = sorted({(part + 1) * len(paths) // PAUSES for part in range(PAUSES)} - {0})
    for _ in predict_iter(model, iter(paths[:batch_size]), batch_size=batch_size):  # warm-up
        pass
    resident: list[float] = []
    predict_time = model_time = 0.0
    previous, timed = 0, 0
    start = time.perf_counter()
    for number, _ in enumerate(predict_iter(model, iter(paths), batch_size=batch_size), start=1):
        if number not in stops:
            continue
        predict_time += time.perf_counter() - start
        if sys.platform == "linux":
            resident.append(resident_mib())
        sample = paths[previous:number][:: max(1, (number - previous) // SAMPLES)][:SAMPLES]
        model_time += model_seconds(model, sample, batch_size)
        previous, timed = number, timed + len(sample)
        start = time.perf_counter()
    rate, model_rate = len(paths) / predict_time, timed / model_time
    return Row(len(paths), rate, model_rate, rate / model_rate, resident)


def main() -> None:
    parser = option_parser(__doc__, repeats=1)
    parser.add_argument("model", type=Path, help="run or model folder, or exported file")
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    apply_options(options)
    model = load_detector(options.model, options.device, options.precision)
    row = measure(model, folder_images(options.images), options.batch_size)
    columns = {"images": "", "predict_per_second": ".2f", "model_per_second": ".2f", "ratio": ".2f"}
    finish(options, [row], columns, batch_size=options.batch_size, precision=options.precision)
    print("resident MiB: " + ", ".join(f"{value:.0f}" for value in row.resident_mib))


if __name__ == "__main__":
    main()
