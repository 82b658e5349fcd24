"""Analysis behind the COCO metrics: curves, error types, calibration, confusion and best thresholds.

hotcoco matches and counts; this module converts its results to plain numbers for JSON.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .metrics import AREAS, MAX_DETECTIONS, CocoEvaluation, evaluate_above, mean_or_none, precision_recall, summarize

IOU_THRESHOLD = 0.5  # wherever a single threshold is used
BACKGROUND_IOU = 0.1  # TIDE: a detection that overlaps no object more than this is background
ERROR_TYPES = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")  # in the order of the TIDE paper
CALIBRATION_BINS = 10
SCORES = (0.1, 0.3, 0.5, 0.7, 0.9)  # minimum scores at which errors are counted


class Matches(NamedTuple):
    """The matches of N detections and M objects at IoU 0.5; rows as in `CocoEvaluation`."""

    counted: np.ndarray  # (N,) bool; False on a crowd or beyond the best 100 of an image and class
    hits: np.ndarray  # (N,) bool; whether the detection matches an object of its class
    objects: np.ndarray  # (M,) bool; False for crowds
    partners: np.ndarray  # (N,) int64; the row of the matched object, or -1


def analyze(evaluation: CocoEvaluation) -> dict[str, Any]:
    """Return everything that the report shows of one model, as plain numbers.

    - "metrics": as `coco_metrics`, without "per_class". "objects", "detections": their counts.
    - "classes": per class "name", "objects", AP in total, per IoU and per size, and "best", as `best_f1`.
    - "best": the best threshold for all classes together, as `best_f1`.
    - "curves": precision in thousandths (or None) at recalls 0, 0.01, …, 1, for IoU "50", "75" and the "mean"; the
      first entry is over all classes, the others per class.
    - "f1": F1 in thousandths (or None) at IoU 0.5 and minimum scores 0, 0.01, …, 1; entries as in "curves".
    - "errors": see `tide`; "error_counts": see `error_counts`, at the best threshold and at `SCORES`.
    - "calibration", "confusion": see `calibration` and `confusion`, at the best threshold.
    """
    matches = match(evaluation)
    best = best_f1(*_scores_and_hits(evaluation, matches))
    threshold = best["threshold"] if best else 0.0
    classes = range(1, len(evaluation.names) + 1)
    return {
        "metrics": {name: value for name, value in summarize(evaluation).items() if name != "per_class"},
        "objects": int(matches.objects.sum()),
        "detections": len(evaluation.detections),
        "classes": _classes(evaluation, matches),
        "best": best,
        "curves": _curves(evaluation),
        "f1": [f1_curve(*_scores_and_hits(evaluation, matches, number)) for number in (None, *classes)],
        "errors": tide(evaluation),
        "error_counts": error_counts(evaluation, [threshold, *SCORES]),
        "calibration": calibration(evaluation),
        "confusion": confusion(evaluation, threshold),
    }


def match(evaluation: CocoEvaluation) -> Matches:
    """Return the matches at IoU 0.5, each detection to an object of its own class, as COCO counts AP50."""
    result = evaluation.evaluator.image_diagnostics(IOU_THRESHOLD)
    num_detections, num_objects = len(evaluation.detections), len(evaluation.objects["area"])
    counted, hits = np.zeros((2, num_detections), dtype=bool)
    counted[_rows(result["dt_status"])] = True
    objects = np.zeros(num_objects, dtype=bool)
    objects[_rows(result["gt_status"])] = True
    objects &= evaluation.objects["iscrowd"] == 0
    pairs = np.array(list(result["dt_match"].items()), dtype=np.int64).reshape(-1, 2) - 1
    pairs = pairs[objects[pairs[:, 1]]]
    partners = np.full(num_detections, -1, dtype=np.int64)
    partners[pairs[:, 0]] = pairs[:, 1]
    hits[pairs[:, 0]] = True
    return Matches(counted, hits, objects, partners)


def best_f1(scores: np.ndarray, hits: np.ndarray, num_objects: int) -> dict[str, float] | None:
    """Return the "threshold" of the scores (N,) with the best F1, and its "f1", "precision" and "recall".

    F1 = 2 · precision · recall / (precision + recall). Of equals, the highest threshold. None without objects or hits.
    """
    if not num_objects or not hits.any():
        return None
    order = np.argsort(-scores, kind="stable")
    scores, true_positives = scores[order], np.cumsum(hits[order])
    last = np.append(scores[1:] != scores[:-1], True)  # a threshold keeps all detections of a score or none
    true_positives, selected, scores = true_positives[last], np.flatnonzero(last) + 1, scores[last]
    f1 = 2 * true_positives / (selected + num_objects)
    k = int(f1.argmax())
    precision, recall = true_positives[k] / selected[k], true_positives[k] / num_objects
    point = {"threshold": scores[k], "f1": f1[k], "precision": precision, "recall": recall}
    return {name: float(value) for name, value in point.items()}


def f1_curve(scores: np.ndarray, hits: np.ndarray, num_objects: int) -> list[int] | None:
    """Return F1 in thousandths with the scores (N,) of at least 0, 0.01, …, 1. None without objects."""
    if not num_objects:
        return None
    thresholds = np.arange(101) / 100
    selected, correct = (
        len(values) - np.searchsorted(np.sort(values), thresholds) for values in (scores, scores[hits])
    )
    return (2000 * correct / (selected + num_objects)).round().astype(int).tolist()


def tide(evaluation: CocoEvaluation) -> dict[str, Any]:
    """Return TIDE's error types (Bolya et al., 2020): how much AP50 would gain without the errors of one type.

    {"AP50", "types": [{"type", "gain"}], "false_positives", "false_negatives"}; no objects: None
    """
    result = evaluation.evaluator.tide_errors(IOU_THRESHOLD, BACKGROUND_IOU)
    gains = result["delta_ap"]
    return {
        "AP50": result["ap_base"],
        "types": [{"type": name, "gain": gains[name]} for name in ERROR_TYPES],
        "false_positives": gains["FP"],
        "false_negatives": gains["FN"],
    }


def error_counts(evaluation: CocoEvaluation, thresholds: Sequence[float]) -> list[dict[str, Any]]:
    """Return the errors of each of TIDE's types among the detections with scores of at least each threshold.

    [{"threshold", "counts": one per type of `ERROR_TYPES`}]
    """
    rows = []
    for threshold in thresholds:
        result = evaluate_above(evaluation, threshold, IOU_THRESHOLD).tide_errors(IOU_THRESHOLD, BACKGROUND_IOU)
        rows.append({"threshold": threshold, "counts": [result["counts"][name] for name in ERROR_TYPES]})
    return rows


def calibration(evaluation: CocoEvaluation) -> dict[str, Any]:
    """Return the expected calibration error and, in ten bins of score, the share of correct detections at IoU 0.5.

    {"ece": 0..1 or None, "bins": [{"low", "high", "score": mean, "accuracy", "count"}]}
    """
    result = evaluation.evaluator.calibration(CALIBRATION_BINS, IOU_THRESHOLD)
    keys = {"low": "bin_lower", "high": "bin_upper", "score": "avg_confidence", "accuracy": "avg_accuracy",
            "count": "count"}  # fmt: skip
    bins = [{key: row[column] for key, column in keys.items()} for row in result["bins"]]
    return {"ece": result["ece"] if result["num_detections"] else None, "bins": bins}


def confusion(evaluation: CocoEvaluation, threshold: float) -> dict[str, Any]:
    """Return the confusion matrix at IoU 0.5 of detections with scores of at least `threshold`.

    {"threshold", "matrix"}: K + 1 rows of the objects' classes, K + 1 columns of the detections' classes. The last row
    is detections on background, the last column missed objects.
    """
    result = evaluation.evaluator.confusion_matrix(IOU_THRESHOLD, MAX_DETECTIONS[-1], threshold)
    return {"threshold": threshold, "matrix": result["matrix"].astype(int).tolist()}


def _rows(status: dict[int, Any]) -> np.ndarray:
    """Return the 0-based rows of hotcoco's record ids."""
    return np.fromiter(status, dtype=np.int64, count=len(status)) - 1


def _scores_and_hits(
    evaluation: CocoEvaluation, matches: Matches, class_number: int | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the arguments of `best_f1` for one class, or for all classes together."""
    counted, objects = matches.counted, matches.objects
    if class_number is not None:
        counted = counted & (evaluation.detections[:, 6] == class_number)
        objects = objects & (evaluation.objects["category_ids"] == class_number)
    return evaluation.detections[counted, 5], matches.hits[counted], int(objects.sum())


def _classes(evaluation: CocoEvaluation, matches: Matches) -> list[dict[str, Any]]:
    precision = precision_recall(evaluation)[0][..., -1]  # (T, R, K, areas)
    class_numbers = evaluation.objects["category_ids"][matches.objects]
    counts = np.bincount(class_numbers, minlength=len(evaluation.names) + 1)
    rows = []
    for k, name in enumerate(evaluation.names):
        table = precision[:, :, k]
        row: dict[str, Any] = {"name": name, "objects": int(counts[k + 1]), "AP": mean_or_none(table[:, :, 0])}
        row |= {"AP50": mean_or_none(table[0, :, 0]), "AP75": mean_or_none(table[5, :, 0])}
        row |= {f"AP_{area}": mean_or_none(table[:, :, a]) for a, area in enumerate(AREAS) if a}
        rows.append(row | {"best": best_f1(*_scores_and_hits(evaluation, matches, k + 1))})
    return rows


def _curves(evaluation: CocoEvaluation) -> list[dict[str, Any]]:
    precision = precision_recall(evaluation)[0][:, :, :, 0, -1]  # (T, R, K)
    has_objects = (precision[0, 0] > -1) if precision.shape[2] else np.zeros(0, dtype=bool)
    curves = []
    for classes in [np.flatnonzero(has_objects), *([k] if present else [] for k, present in enumerate(has_objects))]:
        curve: dict[str, Any] = {"50": None, "75": None, "mean": None}
        if len(classes):
            table = precision[:, :, classes].mean(axis=2)
            lines = {"50": table[0], "75": table[5], "mean": table.mean(axis=0)}
            curve = {name: (1000 * line).round().astype(int).tolist() for name, line in lines.items()}
        curves.append(curve)
    return curves
