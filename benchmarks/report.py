"""Measure the time and size of the report of a large evaluation, without the model.

    python benchmarks/report.py --images 5000

Creates a COCO dataset with image files of many sizes and 100 synthetic detections per image of two models, with every
type of error. Times what `evaluate --report` does besides running the model: opening the dataset, matching, COCO
metrics, the analysis, the images and writing the page.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from deformable_detr.data.dataset import open_dataset
from deformable_detr.evaluation import EvaluationResult
from deformable_detr.evaluation.metrics import run_coco_eval, summarize
from deformable_detr.evaluation.report import write_report

SIDES = ((640, 480), (480, 640), (640, 427), (500, 375), (333, 500), (1280, 960), (96, 64))  # width, height
LARGE = (4000, 3000)  # one image in 100
DETECTIONS = 100  # per image


def make_images(folder, number, random):
    """Write the images and return their COCO records; images of one size share their pixels."""
    folder.mkdir(parents=True)
    files = {}
    for size in (*SIDES, LARGE):
        grain = random.integers(70, 190, (12, 16, 3), dtype=np.uint8)
        noise = random.normal(0, 9, (size[1], size[0], 1))
        pixels = np.asarray(Image.fromarray(grain).resize(size, Image.Resampling.BICUBIC)) + noise
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "pattern.jpg", quality=90)
        files[size] = (folder / "pattern.jpg").read_bytes()
    (folder / "pattern.jpg").unlink()
    records = []
    for n in range(number):
        size = LARGE if n % 100 == 99 else SIDES[int(random.integers(len(SIDES)))]
        name = f"{n:06d}.jpg"
        (folder / name).write_bytes(files[size])
        records.append({"id": n + 1, "file_name": name, "width": size[0], "height": size[1]})
    return records


def make_objects(images, classes, random):
    """Return COCO annotations: about seven per image, class frequencies as in COCO, one in 50 a crowd."""
    frequency = 1 / np.arange(1, classes + 1)
    annotations = []
    for image in images:
        sides = np.array([image["width"], image["height"]])
        for _ in range(random.poisson(7)):
            extent = sides * random.uniform(0.03, 0.6, 2)
            corner = random.uniform(0, 1, 2) * (sides - extent)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image["id"], "bbox": [*corner.tolist(), *extent.tolist()],
                 "category_id": int(random.choice(classes, p=frequency / frequency.sum())) + 1,
                 "area": float(extent.prod()), "iscrowd": int(random.random() < 0.02)}
            )  # fmt: skip
    return annotations


def make_results(images, annotations, classes, random):
    """Return COCO results: most objects detected once or twice, some badly or misclassified, the rest background."""
    by_image = {image["id"]: [] for image in images}
    for annotation in annotations:
        by_image[annotation["image_id"]].append(annotation)
    results = []
    for image in images:
        sides = np.array([image["width"], image["height"]])
        detections = []
        for annotation in by_image[image["id"]]:
            for _ in range(int(random.choice([0, 1, 1, 1, 2]))):
                box = np.array(annotation["bbox"])
                box += random.normal(0, random.choice([0.03, 0.2]), 4) * [*box[2:], *box[2:]]
                label = annotation["category_id"] if random.random() < 0.85 else int(random.integers(classes)) + 1
                detections.append(([*box[:2], *np.abs(box[2:])], label, random.beta(4, 2)))
        while len(detections) < DETECTIONS:
            extent = sides * random.uniform(0.02, 0.5, 2)
            box = [*(random.uniform(0, 1, 2) * (sides - extent)), *extent]
            detections.append((box, int(random.integers(classes)) + 1, random.beta(1, 12)))
        results.extend(
            {"image_id": image["id"], "category_id": label, "bbox": [float(v) for v in box], "score": float(score)}
            for box, label, score in detections[:DETECTIONS]
        )
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--out", type=Path, help="folder for the pages; by default they are not kept")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        images = make_images(data / "valid", options.images, random)
        annotations = make_objects(images, options.classes, random)
        categories = [{"id": k + 1, "name": f"class {k + 1}"} for k in range(options.classes)]
        truth = {"images": images, "annotations": annotations, "categories": categories}
        (data / "valid" / "_annotations.coco.json").write_text(json.dumps(truth))
        models = [make_results(images, annotations, options.classes, random) for _ in range(2)]
        report = measure(data, models, options.out or Path(folder))
    report |= {"images": options.images, "classes": options.classes, "objects": len(annotations)}
    report["detections_per_model"] = len(models[0])
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def measure(data, models, out):
    """Return seconds per step and sizes in MB, for one model and for two side by side."""
    report = {}
    start = time.perf_counter()
    dataset = open_dataset(data, split="val")
    report["open_dataset_s"] = open_seconds = time.perf_counter() - start
    evaluations = []
    seconds_per_model = []
    for number, results in enumerate(models):
        start = time.perf_counter()
        coco = run_coco_eval(dataset.ground_truth, results)
        metrics = {**summarize(coco), "images": len(dataset), "images_per_second": 1.0}
        paths = {int(image_id): dataset.path(index) for index, image_id in enumerate(dataset.image_ids)}
        evaluations.append(EvaluationResult(metrics, coco, results, paths, 1.0, "none", f"model {number + 1}"))
        seconds_per_model.append(time.perf_counter() - start)
    report["coco_eval_one_model_s"] = seconds_per_model[0]
    for name, selected in (("one_model", evaluations[:1]), ("two_models", evaluations)):
        start = time.perf_counter()
        page = write_report(out / f"{name.replace('_', '-')}.html", selected, "synthetic", "val")
        seconds = time.perf_counter() - start
        report[f"page_{name}_s"] = seconds
        report[f"total_{name}_s"] = open_seconds + sum(seconds_per_model[: len(selected)]) + seconds
        report[f"page_{name}_mb"] = page.stat().st_size / 1e6
    return {name: round(value, 2) for name, value in report.items()}


if __name__ == "__main__":
    main()
