"""The analysis compared with slow reference implementations, and TIDE with its authors' package."""

import numpy as np
import pytest

from deformable_detr.evaluation import coco_metrics
from deformable_detr.evaluation.analysis import BACKGROUND_IOU, ERROR_TYPES, SCORES, analyze, best_f1, f1_curve, match
from deformable_detr.evaluation.metrics import run_coco_eval
from tests.support.detections import synthetic_detections
from tests.support.mask_scenes import masked_scene
from tests.support.tide import tide_reference

# Percentages of tidecv 1.0.1 on `synthetic_detections(seed=1)`, for when the package is not installed.
TIDE_AP50 = 48.601852072199954
TIDE_GAINS = {
    "Cls": 9.380020879659945, "Loc": 20.94095983054806, "Both": 0.5594931304100754, "Dupe": 2.051839412596941,
    "Bkg": 0.052734183526816025, "Miss": 6.708900494329605,
}  # fmt: skip


@pytest.fixture(scope="module")
def case():
    return synthetic_detections(seed=1)


def box_iou(a, b):
    """Return the IoU of two xywh boxes."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    return intersection / (a[2] * a[3] + b[2] * b[3] - intersection)


def reference_matches(truth, results, same_class=True):
    """Return the index of the matched annotation at IoU 0.5 or None per result, best scores first, crowds excluded."""
    used, matches = set(), [None] * len(results)
    for index in sorted(range(len(results)), key=lambda index: -results[index]["score"]):
        result, best, partner = results[index], 0.5, None
        for number, annotation in enumerate(truth["annotations"]):
            if number in used or annotation["image_id"] != result["image_id"]:
                continue
            if same_class and annotation["category_id"] != result["category_id"]:
                continue
            if box_iou(annotation["bbox"], result["bbox"]) >= best:
                best, partner = box_iou(annotation["bbox"], result["bbox"]), number
        if partner is not None:
            used.add(partner)
            matches[index] = partner
    return matches


def test_matches_equal_the_reference(case):
    truth, results = case
    matches = match(run_coco_eval(truth, results))
    expected = reference_matches(truth, results)
    assert matches.counted.all()
    assert matches.objects.all()
    assert matches.partners.tolist() == [-1 if partner is None else partner for partner in expected]
    assert (matches.hits == (matches.partners >= 0)).all()


def test_detections_on_crowds_are_ignored():
    truth, results = synthetic_detections(seed=2, crowds=0.3)
    matches = match(run_coco_eval(truth, results))
    crowd = np.array([annotation["iscrowd"] for annotation in truth["annotations"]], dtype=bool)
    assert (matches.objects == ~crowd).all()
    assert not matches.hits[~matches.counted].any()
    assert 0 < (~matches.counted).sum() < len(results) / 2
    truth_without_crowds = {
        **truth,
        "annotations": [record for record in truth["annotations"] if not record["iscrowd"]],
    }
    without_crowds = match(run_coco_eval(truth_without_crowds, results))
    assert without_crowds.hits.sum() == matches.hits.sum()
    assert (without_crowds.hits & without_crowds.counted)[matches.counted].sum() == matches.hits.sum()


def test_metrics_equal_coco_metrics(case):
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


def test_best_threshold_has_the_highest_f1(case):
    truth, results = case
    analysis = analyze(run_coco_eval(truth, results))
    expected = reference_matches(truth, results)
    for row, category in [(analysis, None), *zip(analysis["classes"], truth["categories"], strict=True)]:
        scored_hits = [
            (result["score"], partner is not None)
            for result, partner in zip(results, expected, strict=True)
            if category is None or result["category_id"] == category["id"]
        ]
        best = max(_at(scored_hits, score, row["objects"]) for score, _ in scored_hits)
        assert row["best"]["f1"] == pytest.approx(best[0])
        assert _at(scored_hits, row["best"]["threshold"], row["objects"]) == pytest.approx(
            tuple(row["best"][key] for key in ("f1", "precision", "recall"))
        )


def _at(scored_hits, threshold, objects):
    hits = [hit for score, hit in scored_hits if score >= threshold]
    precision, recall = sum(hits) / len(hits), sum(hits) / objects
    return (2 * precision * recall / (precision + recall) if any(hits) else 0.0, precision, recall)


def test_equal_scores_share_a_threshold():
    scores, hits = np.array([0.9, 0.5, 0.5, 0.5]), np.array([False, True, False, False])
    assert list(best_f1(scores, hits, 1).values()) == pytest.approx([0.5, 0.4, 0.25, 1.0])
    assert best_f1(scores, np.zeros(4, dtype=bool), 1) is None
    assert best_f1(scores, hits, 0) is None


def test_calibration_matches_its_definition(case):
    truth, results = case
    calibration = analyze(run_coco_eval(truth, results))["calibration"]
    hits = np.array([partner is not None for partner in reference_matches(truth, results)])
    scores = np.array([result["score"] for result in results])
    gap = 0.0
    for number, bin_ in enumerate(calibration["bins"]):
        in_bin = (scores >= number / 10) & (scores < (number + 1) / 10)
        assert bin_["count"] == in_bin.sum()
        if in_bin.any():
            assert bin_["accuracy"] == pytest.approx(hits[in_bin].mean())
            assert bin_["score"] == pytest.approx(scores[in_bin].mean())
            gap += in_bin.sum() / len(scores) * abs(hits[in_bin].mean() - scores[in_bin].mean())
    assert calibration["ece"] == pytest.approx(gap)


def test_confusion_matrix_matches_its_definition(case):
    truth, results = case
    analysis = analyze(run_coco_eval(truth, results))
    threshold = analysis["confusion"]["threshold"]
    assert threshold == analysis["best"]["threshold"]
    results = [result for result in results if result["score"] >= threshold]
    rows = {category["id"]: k for k, category in enumerate(truth["categories"])}
    matrix = np.zeros((5, 5), dtype=int)
    expected = reference_matches(truth, results, same_class=False)
    for result, partner in zip(results, expected, strict=True):
        row = 4 if partner is None else rows[truth["annotations"][partner]["category_id"]]
        matrix[row, rows[result["category_id"]]] += 1
    for number, annotation in enumerate(truth["annotations"]):
        matrix[rows[annotation["category_id"]], 4] += number not in expected
    assert analysis["confusion"]["matrix"] == matrix.tolist()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_tide_matches_the_package_of_its_authors(seed, monkeypatch):
    truth, results = synthetic_detections(seed=seed)
    ap, gains, special = tide_reference(truth, results, monkeypatch)
    errors = analyze(run_coco_eval(truth, results))["errors"]
    assert 100 * errors["AP50"] == pytest.approx(ap, abs=0.01)
    for error in errors["types"]:
        assert 100 * error["gain"] == pytest.approx(gains[error["type"]], abs=0.01), error["type"]
    assert 100 * errors["false_positives"] == pytest.approx(special["FalsePos"], abs=0.01)
    assert 100 * errors["false_negatives"] == pytest.approx(special["FalseNeg"], abs=0.01)


def test_tide_matches_recorded_values(case):
    errors = analyze(run_coco_eval(*case))["errors"]
    assert 100 * errors["AP50"] == pytest.approx(TIDE_AP50)
    assert {error["type"]: 100 * error["gain"] for error in errors["types"]} == pytest.approx(TIDE_GAINS)


@pytest.mark.parametrize("masks", [False, True])
def test_error_counts_are_those_of_the_filtered_detections(masks, case):
    """The false positives are those of `match`, and all types those of an evaluation of these detections alone."""
    truth, results = masked_scene(3, objects=40, spurious=30) if masks else case
    kind = "segm" if masks else "bbox"
    evaluation = run_coco_eval(truth, results, kind)
    analysis, matches = analyze(evaluation), match(evaluation)
    thresholds = [analysis["best"]["threshold"], *SCORES]
    assert [row["threshold"] for row in analysis["error_counts"]] == thresholds
    for threshold, row in zip(thresholds, analysis["error_counts"], strict=True):
        counts = dict(zip(ERROR_TYPES, row["counts"], strict=True))
        kept = [result for result in results if result["score"] >= threshold]
        alone = run_coco_eval(truth, kept, kind).evaluator.tide_errors(0.5, BACKGROUND_IOU)["counts"]
        assert counts == alone
        selected = matches.counted & (evaluation.detections[:, 5] >= threshold)
        assert sum(row["counts"]) - counts["Miss"] == (selected & ~matches.hits).sum()
    totals = [sum(row["counts"][:5]) for row in analysis["error_counts"][1:]]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[-1]


def test_f1_curve_equals_the_definition(case):
    truth, results = case
    evaluation = run_coco_eval(truth, results)
    analysis, matches = analyze(evaluation), match(evaluation)
    assert len(analysis["f1"]) == 5
    scores, classes = evaluation.detections[:, 5], evaluation.detections[:, 6]
    for number, curve in enumerate(analysis["f1"]):
        chosen = classes == number if number else classes > 0
        objects = sum(number in (0, evaluation.categories[one["category_id"]]) for one in truth["annotations"])
        for k, value in enumerate(curve):
            kept = chosen & (scores >= k / 100)
            hits = (kept & matches.hits).sum()
            precision, recall = hits / max(kept.sum(), 1), hits / objects
            f1 = 2 * precision * recall / (precision + recall) if hits else 0
            assert value == round(1000 * f1)
    best = analysis["best"]
    assert max(analysis["f1"][0]) <= 1000 * best["f1"] + 0.5
    assert f1_curve(np.array([0.5]), np.array([True]), 1) == [1000] * 51 + [0] * 50
    assert f1_curve(np.array([0.5]), np.array([False]), 0) is None


@pytest.mark.parametrize("scenario", ["no detections", "no objects", "empty", "one class"])
def test_degenerate_inputs(scenario):
    truth, results = synthetic_detections(images=3, classes=1)
    if scenario in ("no objects", "empty"):
        truth = {**truth, "annotations": []}
    if scenario in ("no detections", "empty"):
        results = []
    analysis = analyze(run_coco_eval(truth, results))
    assert (analysis["best"] is None) == (scenario != "one class")
    assert len(analysis["curves"]) == 2
    assert len(analysis["errors"]["types"]) == len(analysis["error_counts"][0]["counts"]) == 6
    assert len(analysis["f1"]) == 2
    assert (analysis["metrics"]["AP"] is None) == (scenario in ("no objects", "empty"))
