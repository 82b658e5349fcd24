"""Measure the time and peak memory of COCO metrics of boxes and masks beside pycocotools, without a model.

    python benchmarks/segm_eval.py --images 5000 --json segm_eval.json

Each evaluator runs in a process of its own on the same synthetic data: images of 640×480 with star-shaped objects as
polygons, and detections as RLE, most of them objects with a moved outline. The peak memory is that of the process, with
the ground truth and the results. The script fails if the metrics differ by more than 1e-9.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

EVALUATORS = ("pycocotools", "deformable-detr")
HEIGHT, WIDTH = 480, 640


@dataclass(frozen=True)
class Row:
    evaluator: str
    images: int
    objects: int
    detections: int
    seconds: float
    speedup: float
    peak_mib: float


def outlines(count, random):
    """Return (count, P, 2) corners of star-shaped blobs, most of them 30 to 200 pixels wide."""
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radii = np.exp(random.normal(3.4, 0.7, (count, 1))).clip(4, 200)
    waves = random.normal(0, 0.12, (count, 4))
    phases = random.uniform(0, 2 * np.pi, (count, 4))
    harmonics = np.arange(2, 6)[:, None] * angles  # (4, P)
    shape = 1 + np.sum(waves[:, :, None] * np.sin(harmonics + phases[:, :, None]), axis=1)
    points = np.stack([np.cos(angles), np.sin(angles)], axis=-1) * (radii * shape.clip(0.3))[:, :, None]
    return points * random.uniform(0.5, 1, (count, 1, 2)) + random.uniform((0, 0), (WIDTH, HEIGHT), (count, 1, 2))


def make_data(images, objects, detections, classes):
    """Return ground truth and results; `objects` and `detections` are per image."""
    import hotcoco

    random = np.random.default_rng(0)
    annotations, results = [], []
    size = [HEIGHT, WIDTH]
    for image in range(1, images + 1):
        corners = outlines(objects, random).clip(0, (WIDTH, HEIGHT)).round(1)
        labels = random.integers(1, classes + 1, objects)
        for label, outline in zip(labels.tolist(), corners, strict=True):
            rle = hotcoco.mask.fr_poly(outline.flatten().tolist(), HEIGHT, WIDTH)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": label, "iscrowd": 0,
                 "bbox": hotcoco.mask.to_bbox(rle).tolist(), "area": float(hotcoco.mask.area(rle)),
                 "segmentation": [outline.flatten().tolist()]}
            )  # fmt: skip
        found = corners[random.integers(0, objects, detections)], random.normal(0, 4, (detections, 1, 2))
        outside = random.random(detections) < 0.4
        shapes = np.where(outside[:, None, None], outlines(detections, random), found[0] + found[1])
        scores = np.where(outside, random.beta(1, 8, detections), random.beta(3, 2, detections))
        for label, score, outline in zip(random.integers(1, classes + 1, detections), scores, shapes, strict=True):
            rle = hotcoco.mask.fr_poly(outline.flatten().tolist(), HEIGHT, WIDTH)
            results.append(
                {"image_id": image, "category_id": int(label), "bbox": hotcoco.mask.to_bbox(rle).tolist(),
                 "segmentation": {"size": size, "counts": rle["counts"].decode()}, "score": float(score)}
            )  # fmt: skip
    listed = [{"id": image, "height": HEIGHT, "width": WIDTH} for image in range(1, images + 1)]
    categories = [{"id": k, "name": f"class {k}"} for k in range(1, classes + 1)]
    return {"images": listed, "categories": categories, "annotations": annotations}, results


def run_pycocotools(ground_truth, results):
    """Return AP of boxes and masks. It changes its inputs, so the masks run first, without boxes."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    boxes = [result.pop("bbox") for result in results]
    aps = []
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        truth = COCO()
        truth.dataset = ground_truth
        truth.createIndex()
        for kind in ("segm", "bbox"):
            if kind == "bbox":
                for result, box in zip(results, boxes, strict=True):
                    result["bbox"] = box
            evaluator = COCOeval(truth, truth.loadRes(results), kind)
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
            aps.insert(0, float(evaluator.stats[0]))
    return aps


def run_ours(ground_truth, results):
    from deformable_detr.evaluation.metrics import coco_metrics

    metrics = coco_metrics(ground_truth, results, masks=True)
    return [metrics["AP"], metrics["segm"]["AP"]]


def measure(name, sizes):
    """Run one evaluator in this process and print its AP, seconds and peak memory as JSON."""
    run = run_pycocotools if name == "pycocotools" else run_ours
    run(*make_data(1, 1, 1, 1))  # imports
    data = make_data(*sizes)
    start = time.perf_counter()
    aps = run(*data)
    seconds = time.perf_counter() - start
    peak_kib = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    print(json.dumps([aps, seconds, peak_kib / 1024]))


def main():
    if len(sys.argv) == 3 and sys.argv[1] in EVALUATORS:
        measure(sys.argv[1], json.loads(sys.argv[2]))
        return
    from common import apply_options, finish, option_parser

    parser = option_parser(__doc__, repeats=1)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--objects", type=int, default=7, help="annotated objects per image")
    parser.add_argument("--detections", type=int, default=100, help="detections per image")
    parser.add_argument("--classes", type=int, default=80)
    options = parser.parse_args()
    apply_options(options)
    rows, aps = [], []
    for name in EVALUATORS:
        sizes = json.dumps([options.images, options.objects, options.detections, options.classes])
        command = [sys.executable, __file__, name, sizes]
        outputs = [json.loads(subprocess.check_output(command)) for _ in range(options.repeats)]
        aps.append(outputs[0][0])
        seconds = float(np.median([output[1] for output in outputs]))
        speedup = rows[0].seconds / seconds if rows else 1.0
        peak = max(output[2] for output in outputs)
        rows.append(Row(name, options.images, options.objects, options.detections, seconds, speedup, peak))
    if np.abs(np.subtract(*aps)).max() > 1e-9:
        raise SystemExit(f"the AP of boxes and masks differs: {dict(zip(EVALUATORS, aps, strict=True))}")
    columns = {"evaluator": "", "images": "d", "objects": "d", "detections": "d"}
    finish(options, rows, {**columns, "seconds": ".1f", "speedup": ".1f", "peak_mib": ".0f"}, ap=aps[0])


if __name__ == "__main__":
    main()
