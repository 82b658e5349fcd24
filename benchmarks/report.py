"""How long the report of a large evaluation takes beside the model, and how large its page is.

    python benchmarks/report.py --images 5000

Makes a COCO data set with real image files of many sizes and the detections of two models that do not exist: right
ones, every kind of error, and low scores up to 100 an image. Timed is what `evaluate --report` does besides running the
model: opening the set, matching, COCO's figures, the analysis, the pictures and writing the page.
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
LARGE = (4000, 3000)  # one image in a hundred
FOUND = 100  # detections an image


def make_images(folder, number, random):
    """COCO's records of the images; neighbors of one size share their pixels, which nothing here looks at."""
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
    """COCO's annotations: about seven an image, classes as unequal as in COCO, one in fifty a crowd."""
    share = 1 / np.arange(1, classes + 1)
    annotations = []
    for image in images:
        sides = np.array([image["width"], image["height"]])
        for _ in range(random.poisson(7)):
            extent = sides * random.uniform(0.03, 0.6, 2)
            corner = random.uniform(0, 1, 2) * (sides - extent)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image["id"], "bbox": [*corner.tolist(), *extent.tolist()],
                 "category_id": int(random.choice(classes, p=share / share.sum())) + 1,
                 "area": float(extent.prod()), "iscrowd": int(random.random() < 0.02)}
            )  # fmt: skip
    return annotations


def make_results(images, annotations, classes, random):
    """COCO's results: most objects found once or twice, some badly or as another class; the rest is background."""
    by_image = {image["id"]: [] for image in images}
    for one in annotations:
        by_image[one["image_id"]].append(one)
    results = []
    for image in images:
        sides = np.array([image["width"], image["height"]])
        found = []
        for one in by_image[image["id"]]:
            for _ in range(int(random.choice([0, 1, 1, 1, 2]))):
                box = np.array(one["bbox"])
                box += random.normal(0, random.choice([0.03, 0.2]), 4) * [*box[2:], *box[2:]]
                label = one["category_id"] if random.random() < 0.85 else int(random.integers(classes)) + 1
                found.append(([*box[:2], *np.abs(box[2:])], label, random.beta(4, 2)))
        while len(found) < FOUND:
            extent = sides * random.uniform(0.02, 0.5, 2)
            box = [*(random.uniform(0, 1, 2) * (sides - extent)), *extent]
            found.append((box, int(random.integers(classes)) + 1, random.beta(1, 12)))
        results.extend(
            {"image_id": image["id"], "category_id": label, "bbox": [float(v) for v in box], "score": float(score)}
            for box, label, score in found[:FOUND]
        )
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--out", type=Path, help="folder for the pages, which are not kept without one")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "data"
        images = make_images(data / "valid", options.images, random)
        annotations = make_objects(images, options.classes, random)
        categories = [{"id": k + 1, "name": f"class {k + 1}"} for k in range(options.classes)]
        truth = {"images": images, "annotations": annotations, "categories": categories}
        (data / "valid" / "_annotations.coco.json").write_text(json.dumps(truth))
        models = [make_results(images, annotations, options.classes, random) for _ in range(2)]
        told = measure(data, models, options.out or Path(place))
    told |= {"images": options.images, "classes": options.classes, "objects": len(annotations)}
    told["detections of a model"] = len(models[0])
    print(json.dumps(told, indent=1))
    if options.json:
        options.json.write_text(json.dumps(told, indent=1) + "\n")


def measure(data, models, out):
    """Seconds by step and bytes, of one model and of two side by side."""
    told = {}
    start = time.perf_counter()
    dataset = open_dataset(data, split="val")
    told["open the set, s"] = opened = time.perf_counter() - start
    evaluated = []
    counting = []
    for number, results in enumerate(models):
        start = time.perf_counter()
        coco = run_coco_eval(dataset.ground_truth, results)
        metrics = {**summarize(coco), "images": len(dataset), "images_per_second": 1.0}
        paths = {int(identity): dataset.path(index) for index, identity in enumerate(dataset.image_ids)}
        evaluated.append(EvaluationResult(metrics, coco, results, paths, 1.0, "none", f"model {number + 1}"))
        counting.append(time.perf_counter() - start)
    told["count one model, s"] = counting[0]
    for name, chosen in (("one model", evaluated[:1]), ("two models", evaluated)):
        start = time.perf_counter()
        page = write_report(out / f"{name.replace(' ', '-')}.html", chosen, "made up", "val")
        seconds = time.perf_counter() - start
        told[f"page of {name}, s"] = seconds
        told[f"all of {name}, s"] = opened + sum(counting[: len(chosen)]) + seconds
        told[f"page of {name}, MB"] = page.stat().st_size / 1e6
    return {name: round(value, 2) for name, value in told.items()}


if __name__ == "__main__":
    main()
