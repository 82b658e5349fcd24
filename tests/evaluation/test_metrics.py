"""COCO metrics compared with pycocotools on real annotations, and cases that pycocotools gets wrong."""

import contextlib
import copy
import io
import json
import re

import numpy as np
import pytest

from deformable_detr.evaluation.metrics import coco_metrics
from deformable_detr.utils.errors import UserError

METRICS = [
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large",
]  # fmt: skip


def pycocotools_metrics(ground_truth, results):
    """Return the 12 metrics and AP per category id of pycocotools, with -1 as None; inputs are copied."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(ground_truth)
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    precision = evaluator.eval["precision"][:, :, :, 0, 2]
    per_class = {}
    for k, category in enumerate(evaluator.params.catIds):
        values = precision[:, :, k][precision[:, :, k] > -1]
        per_class[category] = float(values.mean()) if values.size else None
    return [None if value == -1 else value for value in evaluator.stats], per_class


def noisy_detections(ground_truth, seed=0):
    """Return detections from the truth: jittered, missed, duplicated, misclassified, on crowds, spurious, tied."""
    rng = np.random.default_rng(seed)
    categories = [category["id"] for category in ground_truth["categories"]]
    results = []
    for annotation in ground_truth["annotations"]:
        if rng.random() < 0.15:
            continue
        for _ in range(1 + (rng.random() < 0.3) + 3 * annotation["iscrowd"]):
            x, y, w, h = annotation["bbox"]
            spread = rng.choice([0.0, 0.03, 0.15])
            x, y = x + rng.normal(0, spread) * w, y + rng.normal(0, spread) * h
            w, h = w * np.exp(rng.normal(0, spread)), h * np.exp(rng.normal(0, spread))
            wrong = rng.random() < 0.1
            category = int(rng.choice(categories)) if wrong else annotation["category_id"]
            score = round(float(rng.random()), 2)
            box = [float(v) for v in (x, y, w, h)]
            results.append({"image_id": annotation["image_id"], "category_id": category, "bbox": box, "score": score})
    for image in ground_truth["images"]:
        for _ in range(5):
            box = [float(v) for v in rng.uniform(1, 200, 4)]
            category, score = int(rng.choice(categories)), float(rng.random())
            results.append({"image_id": image["id"], "category_id": category, "bbox": box, "score": score})
    return results


def scene(annotations, images=(1, 2), names=("cat", "dog")):
    return {
        "images": [{"id": image, "width": 100, "height": 100} for image in images],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, start=1)],
        "annotations": annotations,
    }


def detection(image, category, box, score=0.9):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


ONE = pytest.approx(1.0, abs=1e-12)  # a perfect score is 0.9999999999999998 in pycocotools
CAT = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0}


@pytest.mark.parametrize("name", ["playing_cards", "bccd", "coco_mini"])
def test_matches_pycocotools_on_real_datasets(shared, name):
    ground_truth = json.loads((shared / "data" / name / "val" / "_annotations.coco.json").read_text())
    results = noisy_detections(ground_truth)
    before = copy.deepcopy((ground_truth, results))

    metrics = coco_metrics(ground_truth, results)

    assert (ground_truth, results) == before
    expected, per_class = pycocotools_metrics(ground_truth, results)
    assert list(metrics) == [*METRICS, "per_class"]
    assert [metrics[name] for name in METRICS] == [
        None if v is None else pytest.approx(v, rel=0, abs=1e-9) for v in expected
    ]
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    assert metrics["per_class"] == {
        names[k]: None if v is None else pytest.approx(v, rel=0, abs=1e-9) for k, v in per_class.items()
    }
    assert 0.1 < metrics["AP"] < 0.9  # neither trivial nor perfect


@pytest.mark.parametrize("seed", range(20))
def test_matches_pycocotools_on_random_scenes(seed):
    """Few boxes on a coarse grid: ties, zero-area boxes, crowds, more than 100 detections."""
    rng = np.random.default_rng(seed)
    grid = 1 + 9 * int(seed % 2)
    annotations = [
        {"id": n, "image_id": int(rng.integers(1, 4)), "category_id": int(rng.integers(1, 3)), "bbox": box,
         "area": box[2] * box[3], "iscrowd": int(rng.random() < 0.2)}
        for n, box in enumerate((np.round(rng.uniform(0, 100, (12, 4)) / grid) * grid).tolist(), start=1)
    ]  # fmt: skip
    results = [
        detection(int(rng.integers(1, 4)), int(rng.integers(1, 3)), box, round(float(rng.random()), 1))
        for box in (np.round(rng.uniform(0, 100, (400, 4)) / grid) * grid).tolist()
    ]
    ground_truth = scene(annotations, images=(1, 2, 3))

    metrics = coco_metrics(ground_truth, results)

    expected, per_class = pycocotools_metrics(ground_truth, results)
    assert [metrics[name] for name in METRICS] == [
        None if v is None else pytest.approx(v, rel=0, abs=1e-9) for v in expected
    ]
    assert list(metrics["per_class"].values()) == [
        None if v is None else pytest.approx(v, rel=0, abs=1e-9) for v in per_class.values()
    ]


def test_perfect_detections_and_classes_without_truth():
    metrics = coco_metrics(scene([CAT]), [detection(1, 1, [10, 10, 40, 40])])
    assert (metrics["AP"], metrics["AR100"], metrics["AP_medium"]) == (ONE, ONE, ONE)
    assert metrics["AP_small"] is None
    assert metrics["AR_large"] is None
    assert metrics["per_class"] == {"cat": ONE, "dog": None}


def test_annotation_ids_do_not_matter():
    zero = [{**CAT, "id": 0}]
    results = [detection(1, 1, [10, 10, 40, 40])]
    assert pycocotools_metrics(scene(zero), results)[0][0] == 0.0  # pycocotools reads id 0 as "not matched"
    assert coco_metrics(scene(zero), results)["AP"] == ONE

    duplicate_ids = [CAT, {**CAT, "image_id": 2}]  # two objects with one id
    all_results = [*results, detection(2, 1, [10, 10, 40, 40])]
    assert coco_metrics(scene(duplicate_ids), all_results)["AP"] == ONE
    assert coco_metrics(scene(duplicate_ids), results)["AR100"] == 0.5

    without_id = {key: value for key, value in CAT.items() if key != "id"}
    assert coco_metrics(scene([without_id]), results)["AP"] == ONE


def test_missing_area_and_crowd_flag_get_defaults():
    bare = {key: CAT[key] for key in ("id", "image_id", "category_id", "bbox")}
    results = [detection(1, 1, [12, 10, 40, 44])]
    with pytest.raises(KeyError):
        pycocotools_metrics(scene([bare]), results)
    assert coco_metrics(scene([bare]), results) == coco_metrics(scene([CAT]), results)
    null_values = {**bare, "area": None, "iscrowd": None}
    assert coco_metrics(scene([null_values]), results) == coco_metrics(scene([CAT]), results)


def test_detections_on_crowds_are_not_false_positives():
    crowd = {**CAT, "id": 2, "bbox": [0, 60, 100, 40], "area": 4000, "iscrowd": 1}
    results = [detection(1, 1, [10, 10, 40, 40], 0.8), detection(1, 1, [5, 65, 20, 20], 0.9)]
    assert coco_metrics(scene([CAT, crowd]), results)["AP"] == ONE
    assert coco_metrics(scene([CAT]), results)["AP"] == pytest.approx(0.5)


def test_no_detections_and_no_truth():
    metrics = coco_metrics(scene([CAT]), [])
    assert metrics["AP"] == metrics["AR100"] == 0.0
    assert metrics["AP_small"] is None
    assert metrics["per_class"] == {"cat": 0.0, "dog": None}
    empty = coco_metrics(scene([]), [detection(1, 1, [10, 10, 40, 40])])
    assert {empty[name] for name in METRICS} == {None}
    assert coco_metrics(scene([], images=()), [])["AP"] is None


@pytest.mark.parametrize("images", [("a", "b7"), (5, 900000000000), (7, "seven"), (0, 3)])
def test_image_ids_of_any_kind(images):
    truth = [{**CAT, "image_id": images[0]}, {**CAT, "image_id": images[1], "category_id": 2}]
    results = [detection(images[0], 1, [10, 10, 40, 40]), detection(images[1], 2, [10, 10, 40, 40])]
    assert coco_metrics(scene(truth, images=images), results)["per_class"] == {"cat": ONE, "dog": ONE}
    swapped = [detection(images[1], 1, [10, 10, 40, 40])]
    assert coco_metrics(scene(truth, images=images), swapped)["AP"] == 0.0


def test_classes_with_the_same_name_stay_separate():
    ground_truth = scene([CAT], names=("cat", "cat"))
    assert coco_metrics(ground_truth, [])["per_class"] == {"cat (1)": 0.0, "cat (2)": None}


def test_unlisted_images_and_categories_are_ignored():
    annotations = [CAT, {**CAT, "id": 2, "image_id": 99}, {**CAT, "id": 3, "category_id": 99}]
    results = [detection(1, 1, [10, 10, 40, 40]), detection(1, 98, [10, 10, 40, 40], 0.99)]
    assert coco_metrics(scene(annotations), results)["AP"] == ONE


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (detection(3, 1, [1, 1, 2, 2]), "detection number 1: image id 3 is not in the ground truth"),
        (detection(1, 1, [1, 1, 2]), "detection number 1: bbox [1.0, 1.0, 2.0] is not x, y, width and height"),
        (detection(1, 1, [1, 1, 2, float("nan")]), "detection number 1: bbox [1.0, 1.0, 2.0, nan] is not"),
        (detection(1, 1, [1, 1, 2, 2], float("nan")), "the score is nan"),
    ],
)
def test_invalid_detections_are_reported(result, message):
    with pytest.raises(UserError, match=re.escape(message)):
        coco_metrics(scene([CAT]), [detection(1, 1, [10, 10, 40, 40]), result])


@pytest.mark.parametrize(
    ("ground_truth", "message"),
    [
        (scene([{**CAT, "bbox": [1, 2, 3]}]), "annotation 1: bbox [1.0, 2.0, 3.0] is not"),
        (scene([], images=(1, 1)), "image id 1 is used twice"),
    ],
)
def test_invalid_ground_truth_is_reported(ground_truth, message):
    with pytest.raises(UserError, match=re.escape(message)):
        coco_metrics(ground_truth, [])
