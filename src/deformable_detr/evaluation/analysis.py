"""What lies behind the figures: where precision goes, which errors cost how much, how far scores can be trusted.

Matching, calibration, confusion and the error kinds are hotcoco's; here they are put together as plain numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .metrics import AREAS, MAX_DETECTIONS, Counted, figures, mean, tables

MATCH = 0.5  # least IoU of a match, wherever there is one threshold only
BACKGROUND = 0.1  # TIDE: detections that overlap no object more than this are background
KINDS = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")  # TIDE's, in its paper's order
BINS = 10


class Operating(NamedTuple):
    """The score threshold of the best F1, and what it gives; F1 = 2 · precision · recall / (precision + recall)."""

    threshold: float
    f1: float
    precision: float
    recall: float


class Statuses(NamedTuple):
    """How each detection and object came out at IoU 0.5, rows as in `Counted`.

    counts: (N,) bool, False where a detection is not counted: on a crowd, or beyond the 100 best of image and class.
    hits: (N,) bool, matched to an object of its class. real: (M,) bool, the objects that are no crowd.
    partners: (N,) int64, the row of the object, −1 without.
    """

    counts: np.ndarray
    hits: np.ndarray
    real: np.ndarray
    partners: np.ndarray


def analyze(counted: Counted) -> dict[str, Any]:
    """Everything that the report shows of one model, as plain numbers.

    "figures": see `coco_metrics`. "classes": a record each, with its objects, AP at all, one and each size, and
    `Operating`. "best": the `Operating` of one threshold for all classes, or None. "curves": precision, a whole number
    of thousandths or None, at recalls 0, 0.01, …, 1; of all classes and each, at IoU 0.5, at 0.75 and the mean.
    "errors": TIDE. "calibration": bins of score. "confusion": rows the objects' classes, columns the detections', at
    the best threshold, the last of both background.
    """
    statuses = match(counted)
    best = _operating(counted, statuses, None)
    return {
        "figures": {name: value for name, value in figures(counted).items() if name != "per_class"},
        "objects": int(statuses.real.sum()),
        "detections": len(counted.detections),
        "classes": _classes(counted, statuses),
        "best": None if best is None else best._asdict(),
        "curves": _curves(counted),
        "errors": tide(counted),
        "calibration": calibration(counted),
        "confusion": confusion(counted, best.threshold if best else 0.0),
    }


def match(counted: Counted) -> Statuses:
    """The matches at IoU 0.5, each detection to an object of its own class, as COCO counts AP50."""
    result = counted.evaluator.image_diagnostics(MATCH)
    detections, objects = len(counted.detections), len(counted.objects["area"])
    counts, hits = np.zeros((2, detections), dtype=bool)
    partners = np.full(detections, -1, dtype=np.int64)
    status = result["dt_status"]
    counts[np.fromiter(status, dtype=np.int64, count=len(status)) - 1] = True
    pairs = np.array(list(result["dt_match"].items()), dtype=np.int64).reshape(-1, 2) - 1
    real = np.zeros(objects, dtype=bool)
    real[np.fromiter(result["gt_status"], dtype=np.int64, count=len(result["gt_status"])) - 1] = True
    real &= counted.objects["iscrowd"] == 0
    pairs = pairs[real[pairs[:, 1]]]
    hits[pairs[:, 0]] = True
    partners[pairs[:, 0]] = pairs[:, 1]
    return Statuses(counts, hits, real, partners)


def best_f1(scores: np.ndarray, hits: np.ndarray, objects: int) -> Operating | None:
    """The threshold with the best F1 of detections (N,); the highest where several are as good.

    None where there are no objects or no hits.
    """
    if not objects or not hits.any():
        return None
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], np.cumsum(hits[order])
    last = np.append(scores[1:] != scores[:-1], True)  # a threshold keeps all detections of a score or none
    right, chosen, scores = right[last], np.flatnonzero(last) + 1, scores[last]
    f1 = 2 * right / (chosen + objects)
    at = int(f1.argmax())
    return Operating(float(scores[at]), float(f1[at]), float(right[at] / chosen[at]), float(right[at] / objects))


def tide(counted: Counted) -> dict[str, Any]:
    """TIDE's error kinds (Bolya et al., 2020): what AP50 would gain were all errors of one kind mended.

    {"AP50", "kinds": [{"kind", "gain", "count"}], "false_positives", "false_negatives"}; all but the counts 0..1. None
    for the gains where there are no objects.
    """
    found = counted.evaluator.tide_errors(MATCH, BACKGROUND)
    gains, counts = found["delta_ap"], found["counts"]
    return {
        "AP50": found["ap_base"],
        "kinds": [{"kind": kind, "gain": gains[kind], "count": counts[kind]} for kind in KINDS],
        "false_positives": gains["FP"],
        "false_negatives": gains["FN"],
    }


def calibration(counted: Counted) -> dict[str, Any]:
    """How often detections of a score are right, at IoU 0.5, in ten bins of score.

    {"ece": the gap between score and share of right ones, averaged over detections, or None, "bins": [{"low", "high",
    "score", "right", "count"}]}.
    """
    found = counted.evaluator.calibration(BINS, MATCH)
    names = {"low": "bin_lower", "high": "bin_upper", "score": "avg_confidence", "right": "avg_accuracy"}
    bins = [{**{ours: one[theirs] for ours, theirs in names.items()}, "count": one["count"]} for one in found["bins"]]
    return {"ece": found["ece"] if found["num_detections"] else None, "bins": bins}


def confusion(counted: Counted, threshold: float) -> dict[str, Any]:
    """Objects' classes against detections', at IoU 0.5 and scores from `threshold` up.

    {"threshold", "matrix": (K + 1) rows of the objects' classes, K + 1 columns of the detections'}; the last row are
    detections on background, the last column objects that nothing was found at.
    """
    found = counted.evaluator.confusion_matrix(MATCH, MAX_DETECTIONS[-1], threshold)
    return {"threshold": threshold, "matrix": found["matrix"].astype(int).tolist()}


def _operating(counted: Counted, statuses: Statuses, number: int | None) -> Operating | None:
    """Of one class, or of all at once."""
    chosen, objects = statuses.counts, statuses.real
    if number is not None:
        chosen = chosen & (counted.detections[:, 6] == number)
        objects = objects & (counted.objects["category_ids"] == number)
    return best_f1(counted.detections[chosen, 5], statuses.hits[chosen], int(objects.sum()))


def _classes(counted: Counted, statuses: Statuses) -> list[dict[str, Any]]:
    precision, _ = tables(counted)
    most = len(MAX_DETECTIONS) - 1
    objects = np.bincount(counted.objects["category_ids"][statuses.real], minlength=len(counted.names) + 1)
    rows = []
    for k, name in enumerate(counted.names):
        own = precision[:, :, k, :, most]  # (T, R, areas)
        row: dict[str, Any] = {"name": name, "objects": int(objects[k + 1]), "AP": mean(own[:, :, 0])}
        row |= {"AP50": mean(own[0, :, 0]), "AP75": mean(own[5, :, 0])}
        row |= {f"AP_{area}": mean(own[:, :, place]) for place, area in enumerate(AREAS) if place}
        best = _operating(counted, statuses, k + 1)
        rows.append(row | {"best": None if best is None else best._asdict()})
    return rows


def _curves(counted: Counted) -> list[dict[str, Any]]:
    """The first of all classes, then one a class."""
    precision, _ = tables(counted)
    precision = precision[:, :, :, 0, -1]  # (T, R, K)
    with_objects = (precision[0, 0] > -1) if precision.shape[2] else np.zeros(0, dtype=bool)
    curves = []
    for chosen in [np.flatnonzero(with_objects), *([k] if there else [] for k, there in enumerate(with_objects))]:
        curve: dict[str, Any] = {"50": None, "75": None, "mean": None}
        if len(chosen):
            own = precision[:, :, chosen].mean(axis=2)
            lines = {"50": own[0], "75": own[5], "mean": own.mean(axis=0)}
            curve = {name: (1000 * line).round().astype(int).tolist() for name, line in lines.items()}
        curves.append(curve)
    return curves
