"""The COCO figures of a set of detections, equal to pycocotools' and many times faster.

The counting is hotcoco's. What is here makes annotation files as people have them ready for it: records are
renumbered (pycocotools takes annotation id 0 for "not matched", duplicate ids lose objects), missing areas and crowd
flags get their defaults, and figures for which there is no ground truth are None instead of −1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..utils.errors import UserError

if TYPE_CHECKING:
    import hotcoco

MAX_DETECTIONS = (1, 10, 100)  # an image and class, best scores first
AREAS = ("all", "small", "medium", "large")  # up to 32², up to 96², above, in pixels

Metrics = dict[str, Any]


def coco_metrics(ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Metrics:
    """The 12 COCO figures and the AP of each class, all 0..1.

    ground_truth: a COCO dict: "images" (each an "id"), "categories" (each an "id", a "name") and "annotations" (each
        "image_id", "category_id", "bbox" as x, y, w, h in pixels; "area" defaults to w · h, "iscrowd" to 0). Image ids
        may be integers with gaps or strings; annotation ids are not used. Nothing in it is changed.
    results: detections in COCO's form: {"image_id", "category_id", "bbox": [x, y, w, h], "score"}. As in pycocotools,
        those of a category that the ground truth does not list are not counted.

    Returns {"AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100", "AR_small", "AR_medium",
    "AR_large", "per_class": {name: AP}}. A figure is None where the ground truth has no object for it. A name that two
    categories share is followed by the id: "cat (17)".

    Raises UserError for records that lack a key or hold no finite box, and for detections of an unknown image.
    """
    return figures(count(ground_truth, results))


@dataclass(frozen=True, eq=False)
class Counted:
    """Detections after they were matched to the ground truth, and what the counting knows of both.

    evaluator: hotcoco's, evaluated and accumulated; to it images, classes and records are numbered from 1.
    images, categories: id → number. names: of the classes, in the order of their numbers.
    objects: the ground truth as columns (image_ids, category_ids, boxes xywh, area, iscrowd); object n is row n − 1.
    detections: (N, 7) float64: image, x, y, w, h, score, class, all by number; detection n is row n − 1.
    """

    evaluator: hotcoco.COCOeval
    images: dict[Any, int]
    categories: dict[Any, int]
    names: list[str]
    objects: dict[str, np.ndarray]
    detections: np.ndarray


def count(ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Counted:
    """Matches detections to the ground truth, as `coco_metrics`, which says what both are and what is refused."""
    import hotcoco

    images = _numbers((image["id"] for image in _section(ground_truth, "images")), "image")
    categories = _numbers((category["id"] for category in _section(ground_truth, "categories")), "category")
    names = _unique_names(_section(ground_truth, "categories"), categories)
    objects = _annotation_columns(ground_truth, images, categories)
    truth = hotcoco.COCO.from_arrays(
        [{"id": number, "width": 0, "height": 0} for number in images.values()],
        [{"id": number, "name": name} for number, name in enumerate(names, start=1)],
        **objects,
    )
    detections = _result_rows(results, images, categories)
    evaluator = hotcoco.COCOeval(truth, truth.load_res(detections), "bbox")
    evaluator.params.max_dets = list(MAX_DETECTIONS)
    evaluator.evaluate()
    evaluator.accumulate()
    return Counted(evaluator, images, categories, names, objects, detections)


def tables(counted: Counted) -> tuple[np.ndarray, np.ndarray]:
    """Precision (T thresholds, R recalls, K classes, areas, limits) and recall (T, K, areas, limits).

    Thresholds of IoU are 0.50, 0.55, …, 0.95, recalls 0, 0.01, …, 1; −1 where there is no ground truth.
    """
    result = counted.evaluator.eval
    assert result is not None
    return result["precision"], result["recall"]


def figures(counted: Counted) -> Metrics:
    """What `coco_metrics` returns."""
    precision, recall = tables(counted)
    most = len(MAX_DETECTIONS) - 1
    metrics: Metrics = {
        "AP": mean(precision[:, :, :, 0, most]),
        "AP50": mean(precision[0, :, :, 0, most]),
        "AP75": mean(precision[5, :, :, 0, most]),
    }
    for area, name in enumerate(AREAS[1:], start=1):
        metrics[f"AP_{name}"] = mean(precision[:, :, :, area, most])
    for limit, number in enumerate(MAX_DETECTIONS):
        metrics[f"AR{number}"] = mean(recall[:, :, 0, limit])
    for area, name in enumerate(AREAS[1:], start=1):
        metrics[f"AR_{name}"] = mean(recall[:, :, area, most])
    metrics["per_class"] = {name: mean(precision[:, :, k, 0, most]) for k, name in enumerate(counted.names)}
    return metrics


def mean(values: np.ndarray) -> float | None:
    """The mean of a table's entries; None where there is no ground truth for any."""
    values = values[values > -1]
    return float(values.mean()) if values.size else None


def _section(ground_truth: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    if not isinstance(ground_truth.get(key), list):
        raise UserError(f"ground truth: no list '{key}', which a COCO annotation file needs")
    return ground_truth[key]


def _numbers(ids: Iterable[Hashable], what: str) -> dict[Any, int]:
    """1, 2, … for the ids in their order; detections with equal scores are counted in the order of their images."""
    numbers: dict[Any, int] = {}
    for identity in sorted(ids, key=lambda identity: (isinstance(identity, str), identity)):
        if identity in numbers:
            raise UserError(f"ground truth: {what} id {identity!r} is there twice; give each {what} its own id")
        numbers[identity] = len(numbers) + 1
    return numbers


def _unique_names(categories: Sequence[Mapping[str, Any]], numbers: Mapping[Any, int]) -> list[str]:
    """The classes' names in the order of their numbers."""
    by_number = {numbers[category["id"]]: category for category in categories}
    names = {number: str(by_number[number].get("name", by_number[number]["id"])) for number in sorted(by_number)}
    count = Counter(names.values())
    return [name if count[name] == 1 else f"{name} ({by_number[number]['id']})" for number, name in names.items()]


def _annotation_columns(
    ground_truth: Mapping[str, Any], images: Mapping[Any, int], categories: Mapping[Any, int]
) -> dict[str, Any]:
    """The annotations as columns; those of unlisted images or categories are dropped, as pycocotools drops them."""
    rows = []
    for position, annotation in enumerate(_section(ground_truth, "annotations")):
        where = f"ground truth: annotation {annotation.get('id', f'number {position}')}"
        box = _box(annotation, where)
        image, category = (_known(annotation, key, where) for key in ("image_id", "category_id"))
        if image not in images or category not in categories:
            continue
        area = annotation.get("area")
        area = box[2] * box[3] if area is None else float(area)
        crowd = bool(annotation.get("iscrowd"))
        rows.append((images[image], categories[category], *box, area, crowd))
    table = np.array(rows, dtype=np.float64).reshape(-1, 8)
    return {
        "image_ids": table[:, 0].astype(np.int64),
        "category_ids": table[:, 1].astype(np.int64),
        "boxes": np.ascontiguousarray(table[:, 2:6]),
        "area": np.ascontiguousarray(table[:, 6]),
        "iscrowd": table[:, 7].astype(np.int64),
    }


def _result_rows(
    results: Sequence[Mapping[str, Any]], images: Mapping[Any, int], categories: Mapping[Any, int]
) -> np.ndarray:
    """(N, 7) float64: image, x, y, w, h, score, category."""
    rows = []
    for position, result in enumerate(results):
        where = f"detection number {position}"
        box = _box(result, where)
        image, category = (_known(result, key, where) for key in ("image_id", "category_id"))
        score = float(_known(result, "score", where))
        if image not in images:
            raise UserError(
                f"{where}: image id {image!r} is not in the ground truth; do both come from the same split?"
            )
        if not math.isfinite(score):
            raise UserError(f"{where}: its score is {score}")
        if category in categories:
            rows.append((images[image], *box, score, categories[category]))
    return np.array(rows, dtype=np.float64).reshape(-1, 7)


def _known(record: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in record:
        raise UserError(f"{where} has no '{key}'")
    return record[key]


def _box(record: Mapping[str, Any], where: str) -> tuple[float, float, float, float]:
    box = _known(record, "bbox", where)
    try:
        x, y, width, height = map(float, box)
    except (TypeError, ValueError):
        raise UserError(f"{where}: bbox {box!r} is not [x, y, width, height]") from None
    if not all(map(math.isfinite, (x, y, width, height))):
        raise UserError(f"{where}: bbox {box!r} holds a number that is not finite")
    return x, y, width, height
