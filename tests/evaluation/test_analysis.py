"""The analysis against plain definitions, written out slowly, and TIDE against its authors' package."""

import sys
from unittest.mock import MagicMock

import numpy as np
import pytest

from deformable_detr.evaluation import coco_metrics
from deformable_detr.evaluation.analysis import analyze, best_f1, match
from deformable_detr.evaluation.metrics import run_coco_eval
from tests.support.detections import synthetic_detections

# tidecv 1.0.1 on `synthetic(seed=1)`, percent: its figures where the package is not installed.
TIDE_AP50 = 48.601852072199954
TIDE_GAINS = {
    "Cls": 9.380020879659945, "Loc": 20.94095983054806, "Both": 0.5594931304100754, "Dupe": 2.051839412596941,
    "Bkg": 0.052734183526816025, "Miss": 6.708900494329605,
}  # fmt: skip


@pytest.fixture(scope="module")
def case():
    return synthetic_detections(seed=1)


def overlap(a, b):
    """IoU of two x, y, w, h boxes."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    inside = max(width, 0) * max(height, 0)
    return inside / (a[2] * a[3] + b[2] * b[3] - inside)


def slow_matches(truth, results, same_class=True):
    """For each result the place of its annotation at IoU 0.5 or None; best scores first, crowds not counted."""
    taken, matches = set(), [None] * len(results)
    for place in sorted(range(len(results)), key=lambda place: -results[place]["score"]):
        result, best, partner = results[place], 0.5, None
        for number, annotation in enumerate(truth["annotations"]):
            if number in taken or annotation["image_id"] != result["image_id"]:
                continue
            if same_class and annotation["category_id"] != result["category_id"]:
                continue
            if overlap(annotation["bbox"], result["bbox"]) >= best:
                best, partner = overlap(annotation["bbox"], result["bbox"]), number
        if partner is not None:
            taken.add(partner)
            matches[place] = partner
    return matches


def test_matches_are_those_of_the_definition(case):
    truth, results = case
    matches = match(run_coco_eval(truth, results))
    slow = slow_matches(truth, results)
    assert matches.counted.all()
    assert matches.objects.all()
    assert matches.partners.tolist() == [-1 if partner is None else partner for partner in slow]
    assert (matches.hits == (matches.partners >= 0)).all()


def test_detections_on_crowds_do_not_count():
    truth, results = synthetic_detections(seed=2, crowds=0.3)
    matches = match(run_coco_eval(truth, results))
    crowd = np.array([annotation["iscrowd"] for annotation in truth["annotations"]], dtype=bool)
    assert (matches.objects == ~crowd).all()
    assert not matches.hits[~matches.counted].any()
    assert 0 < (~matches.counted).sum() < len(results) / 2
    without = {**truth, "annotations": [one for one in truth["annotations"] if not one["iscrowd"]]}
    again = match(run_coco_eval(without, results))
    assert again.hits.sum() == matches.hits.sum()
    assert (again.hits & again.counted)[matches.counted].sum() == matches.hits.sum()


def test_figures_are_those_of_coco_metrics(case):
    analysis, metrics = analyze(run_coco_eval(*case)), coco_metrics(*case)
    classes = metrics.pop("per_class")
    assert analysis["metrics"] == metrics
    assert {row["name"]: row["AP"] for row in analysis["classes"]} == classes
    for name in ("AP50", "AP75", "AP_small", "AP_medium", "AP_large"):
        values = [row[name] for row in analysis["classes"] if row[name] is not None]
        assert np.mean(values) == pytest.approx(metrics[name])
    assert np.mean(analysis["curves"][0]["mean"]) / 1000 == pytest.approx(metrics["AP"], abs=1e-3)
    for curve, row in zip(analysis["curves"][1:], analysis["classes"], strict=True):
        assert np.mean(curve["50"]) / 1000 == pytest.approx(row["AP50"], abs=1e-3)
    assert sum(row["objects"] for row in analysis["classes"]) == analysis["objects"] == len(case[0]["annotations"])


def test_best_threshold_is_the_best_of_all(case):
    truth, results = case
    analysis = analyze(run_coco_eval(truth, results))
    slow = slow_matches(truth, results)
    for row, category in [(analysis, None), *zip(analysis["classes"], truth["categories"], strict=True)]:
        own = [
            (result["score"], partner is not None)
            for result, partner in zip(results, slow, strict=True)
            if category is None or result["category_id"] == category["id"]
        ]
        best = max(_at(own, score, row["objects"]) for score, _ in own)
        assert row["best"]["f1"] == pytest.approx(best[0])
        assert _at(own, row["best"]["threshold"], row["objects"]) == pytest.approx(
            tuple(row["best"][key] for key in ("f1", "precision", "recall"))
        )


def _at(own, threshold, objects):
    kept = [hit for score, hit in own if score >= threshold]
    precision, recall = sum(kept) / len(kept), sum(kept) / objects
    return (2 * precision * recall / (precision + recall) if any(kept) else 0.0, precision, recall)


def test_equal_scores_stand_or_fall_together():
    scores, hits = np.array([0.9, 0.5, 0.5, 0.5]), np.array([False, True, False, False])
    assert list(best_f1(scores, hits, 1).values()) == pytest.approx([0.5, 0.4, 0.25, 1.0])
    assert best_f1(scores, np.zeros(4, dtype=bool), 1) is None
    assert best_f1(scores, hits, 0) is None


def test_calibration_by_its_definition(case):
    truth, results = case
    found = analyze(run_coco_eval(truth, results))["calibration"]
    hits = np.array([partner is not None for partner in slow_matches(truth, results)])
    scores = np.array([result["score"] for result in results])
    gap = 0.0
    for number, one in enumerate(found["bins"]):
        inside = (scores >= number / 10) & (scores < (number + 1) / 10)
        assert one["count"] == inside.sum()
        if inside.any():
            assert one["accuracy"] == pytest.approx(hits[inside].mean())
            assert one["score"] == pytest.approx(scores[inside].mean())
            gap += inside.sum() / len(scores) * abs(hits[inside].mean() - scores[inside].mean())
    assert found["ece"] == pytest.approx(gap)


def test_confusion_by_its_definition(case):
    truth, results = case
    analysis = analyze(run_coco_eval(truth, results))
    threshold = analysis["confusion"]["threshold"]
    assert threshold == analysis["best"]["threshold"]
    results = [result for result in results if result["score"] >= threshold]
    places = {category["id"]: k for k, category in enumerate(truth["categories"])}
    matrix = np.zeros((5, 5), dtype=int)
    slow = slow_matches(truth, results, same_class=False)
    for result, partner in zip(results, slow, strict=True):
        row = 4 if partner is None else places[truth["annotations"][partner]["category_id"]]
        matrix[row, places[result["category_id"]]] += 1
    for number, annotation in enumerate(truth["annotations"]):
        matrix[places[annotation["category_id"]], 4] += number not in slow
    assert analysis["confusion"]["matrix"] == matrix.tolist()


def reference(truth, results, monkeypatch):
    """tidecv's AP50 and gains in percent, without the libraries of its plots."""
    pytest.importorskip("pycocotools")
    for name in ("cv2", "seaborn", "pandas", "appdirs", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    tidecv = pytest.importorskip("tidecv", reason="needs tidecv, the reference of TIDE", exc_type=ImportError)
    objects, found = tidecv.Data("truth"), tidecv.Data("found")
    for category in truth["categories"]:
        objects.add_class(category["id"], category["name"])
    for image in truth["images"]:
        objects.add_image(image["id"], str(image["id"]))
    for one in truth["annotations"]:
        add = objects.add_ignore_region if one["iscrowd"] else objects.add_ground_truth
        add(one["image_id"], one["category_id"], one["bbox"])
    for one in results:
        found.add_detection(one["image_id"], one["category_id"], one["score"], one["bbox"])
    run = tidecv.TIDE()
    run.evaluate(objects, found, mode=tidecv.TIDE.BOX)
    errors = run.get_all_errors()
    return next(iter(run.runs.values())).ap, errors["main"]["found"], errors["special"]["found"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_tide_agrees_with_its_authors(seed, monkeypatch):
    truth, results = synthetic_detections(seed=seed)
    ap, gains, special = reference(truth, results, monkeypatch)
    errors = analyze(run_coco_eval(truth, results))["errors"]
    assert 100 * errors["AP50"] == pytest.approx(ap, abs=0.01)
    for one in errors["types"]:
        assert 100 * one["gain"] == pytest.approx(gains[one["type"]], abs=0.01), one["type"]
    assert 100 * errors["false_positives"] == pytest.approx(special["FalsePos"], abs=0.01)
    assert 100 * errors["false_negatives"] == pytest.approx(special["FalseNeg"], abs=0.01)


def test_tide_is_as_recorded(case):
    errors = analyze(run_coco_eval(*case))["errors"]
    assert 100 * errors["AP50"] == pytest.approx(TIDE_AP50)
    assert {one["type"]: 100 * one["gain"] for one in errors["types"]} == pytest.approx(TIDE_GAINS)


@pytest.mark.parametrize("what", ["no detections", "no objects", "nothing", "one class"])
def test_little_to_count(what):
    truth, results = synthetic_detections(images=3, classes=1)
    if what in ("no objects", "nothing"):
        truth = {**truth, "annotations": []}
    if what in ("no detections", "nothing"):
        results = []
    analysis = analyze(run_coco_eval(truth, results))
    assert (analysis["best"] is None) == (what != "one class")
    assert len(analysis["curves"]) == 2
    assert len(analysis["errors"]["types"]) == 6
    assert (analysis["metrics"]["AP"] is None) == (what in ("no objects", "nothing"))
