"""Synthetic ground truth and detections with errors of every type, and the JSON data of report pages."""

import json
import re

import numpy as np

from deformable_detr.evaluation import EvaluationResult
from deformable_detr.evaluation.metrics import run_coco_eval, summarize


def synthetic_detections(images=30, classes=4, objects=5, detections=20, seed=0, crowds=0.0):
    """Return a COCO ground truth and results with distinct scores."""
    random = np.random.default_rng(seed)
    truth = {
        "images": [{"id": 10 * n, "width": 640, "height": 480, "file_name": f"{n}.jpg"} for n in range(1, images + 1)],
        "categories": [{"id": 3 * k + 2, "name": f"class {k}"} for k in range(classes)],
        "annotations": [],
    }
    results = []
    for image in truth["images"]:
        image_detections = 0
        for _ in range(random.poisson(objects)):
            box = [*random.uniform(0, 400, 2), *random.uniform(8, 220, 2)]
            label = int(random.integers(classes))
            crowd = int(random.random() < crowds)
            truth["annotations"].append(
                {"id": len(truth["annotations"]) + 1, "image_id": image["id"], "category_id": 3 * label + 2,
                 "bbox": [float(v) for v in box], "area": float(box[2] * box[3]), "iscrowd": crowd}
            )  # fmt: skip
            for _ in range(int(random.choice([0, 1, 1, 1, 1, 2]))):
                noise = random.normal(0, random.choice([0.03, 0.15]), 4) * [box[2], box[3], box[2], box[3]]
                shifted = np.array(box) + noise
                predicted = label if random.random() < 0.85 else int(random.integers(classes))
                results.append(_result(image, predicted, [*shifted[:2], *np.abs(shifted[2:])], random.beta(4, 2)))
                image_detections += 1
        for _ in range(max(0, detections - image_detections)):
            box = [*random.uniform(0, 400, 2), *random.uniform(8, 200, 2)]
            results.append(_result(image, int(random.integers(classes)), box, random.beta(1, 12)))
    return truth, results


def _result(image, label, box, score):
    return {
        "image_id": image["id"], "category_id": 3 * label + 2, "bbox": [float(v) for v in box], "score": float(score),
    }  # fmt: skip


def evaluation_result(truth, results, paths=None, name="model", masks=False):
    coco = run_coco_eval(truth, results)
    coco_masks = run_coco_eval(truth, results, "segm") if masks else None
    metrics = {**summarize(coco), "images": len(truth["images"]), "images_per_second": 20.0}
    return EvaluationResult(metrics, coco, list(results), paths or {}, 1.5, "cpu", name, coco_masks)


def page_data(page):
    """Return the JSON data of a page and assert that the page is self-contained."""
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
