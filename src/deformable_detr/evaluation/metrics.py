"""COCO metrics of boxes and masks, equal to pycocotools' and many times faster.

hotcoco matches and counts. This module renumbers records for it (pycocotools reads annotation id 0 as "not matched" and
loses objects with duplicate ids), fills in missing areas and crowd flags, and sets the areas of detected masks: hotcoco
takes those of the boxes, as pycocotools does for results that have both.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..utils.errors import UserError
from .masks import detected_masks, mask_sizes, object_masks

if TYPE_CHECKING:
    import hotcoco

MAX_DETECTIONS = (1, 10, 100)  # per image and class, best scores first
MAX_TILED_DETECTIONS = 10_000  # the same for images with tiles
AREAS = ("all", "small", "medium", "large")  # up to 32² pixels, up to 96² pixels, above

IouType = Literal["bbox", "segm"]
Metrics = dict[str, Any]


def coco_metrics(
    ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], masks: bool = False, tiled: bool = False
) -> Metrics:
    """Return the 12 COCO metrics and the AP of each class, all in 0..1.

    Args:
        ground_truth: A COCO dict with "images" (each an "id"), "categories" ("id", "name") and "annotations"
            ("image_id", "category_id", "bbox" as x, y, width, height in pixels; "area" defaults to width · height,
            "iscrowd" to 0; "segmentation" as polygons or RLE). Image ids are integers or strings; annotation ids are
            ignored. It is not changed.
        results: Detections as {"image_id", "category_id", "bbox", "score"}; for masks also "segmentation", an RLE. As
            in pycocotools, detections of a category that the ground truth does not list are ignored.
        masks: Whether to add "segm", the metrics of the masks. Sizes are those of masks, also of detected ones, as in
            detectron2. An object without a mask counts as a crowd that fills its box.
        tiled: See `run_coco_eval`.

    Returns:
        {"AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100", "AR_small", "AR_medium",
        "AR_large", "per_class": {name: AP}}. A metric is None without ground truth for it. If categories share a name,
        the id is appended: "cat (17)". "segm" is a dict of the same form.

    Raises:
        UserError: A box or score is not finite, an id is used twice, a detection is of an unknown image or lacks its
            mask, or a mask is damaged or of another size than its image.
    """
    metrics = summarize(run_coco_eval(ground_truth, results, tiled=tiled))
    return {**metrics, "segm": summarize(run_coco_eval(ground_truth, results, "segm", tiled))} if masks else metrics


@dataclass(frozen=True, eq=False)
class CocoEvaluation:
    """Detections matched to the ground truth. Images, classes and records are numbered from 1."""

    evaluator: hotcoco.COCOeval  # after `accumulate`
    images: dict[Any, int]  # id → number
    categories: dict[Any, int]
    names: list[str]  # of the classes, in the order of their numbers
    objects: dict[str, np.ndarray]  # columns image_ids, category_ids, boxes (xywh), area, iscrowd
    detections: np.ndarray  # (N, 7) float64: image, x, y, width, height, score, class
    object_masks: list[Any] | None = None  # polygons or RLE; None: boxes were compared
    detected_masks: list[Any] | None = None  # RLE


def run_coco_eval(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    iou_type: IouType = "bbox",
    tiled: bool = False,
) -> CocoEvaluation:
    """Match the boxes or masks of detections to the ground truth; arguments and errors as in `coco_metrics`.

    Of `tiled` images, AP counts more than 100 detections per class: `MAX_TILED_DETECTIONS`.
    """
    import hotcoco

    images = _number_ids((image["id"] for image in ground_truth["images"]), "image")
    categories = _number_ids((category["id"] for category in ground_truth["categories"]), "category")
    names = _unique_names(ground_truth["categories"], categories)
    objects, annotations = _annotation_columns(ground_truth, images, categories)
    table, detected = _detection_table(results, images, categories)
    sizes: dict[Any, tuple[int, int]] = {}
    shapes, rles, areas = None, None, None
    if iou_type == "segm":
        sizes = mask_sizes(ground_truth["images"], annotations, detected)
        rles, areas = detected_masks(detected, sizes)
        shapes, boxed = object_masks(annotations, sizes)
        objects["iscrowd"] |= boxed
    truth = hotcoco.COCO.from_arrays(
        [_size_record(number, *sizes.get(image_id, (0, 0))) for image_id, number in images.items()],
        [{"id": number, "name": name} for number, name in enumerate(names, start=1)],
        **objects,
        segmentation=shapes,
    )
    detections = truth.load_res(table, segmentation=rles)
    if rles:
        detections.update_anns(ids=np.arange(1, len(rles) + 1), area=areas)
    evaluator = hotcoco.COCOeval(truth, detections, iou_type)
    evaluator.params.max_dets = [*MAX_DETECTIONS, *([MAX_TILED_DETECTIONS] if tiled else [])]
    evaluator.evaluate()
    evaluator.accumulate()
    return CocoEvaluation(evaluator, images, categories, names, objects, table, shapes, rles)


def evaluate_above(evaluation: CocoEvaluation, threshold: float, iou: float) -> hotcoco.COCOeval:
    """Match only the detections with scores of at least the threshold, at one IoU and for all sizes together."""
    import hotcoco

    kept = evaluation.detections[:, 5] >= threshold
    masks = evaluation.detected_masks and [evaluation.detected_masks[row] for row in np.flatnonzero(kept).tolist()]
    truth = evaluation.evaluator.coco_gt
    detections = truth.load_res(evaluation.detections[kept], segmentation=masks)
    evaluator = hotcoco.COCOeval(truth, detections, "bbox" if evaluation.detected_masks is None else "segm")
    evaluator.params.max_dets, evaluator.params.iou_thrs = list(MAX_DETECTIONS), [iou]
    evaluator.params.area_rng, evaluator.params.area_rng_lbl = evaluator.params.area_rng[:1], list(AREAS[:1])
    evaluator.evaluate()
    return evaluator


def precision_recall(evaluation: CocoEvaluation) -> tuple[np.ndarray, np.ndarray]:
    """Return precision (T, R, K, areas, limits) and recall (T, K, areas, limits); -1 without ground truth.

    T are the IoU thresholds 0.50, 0.55, …, 0.95; R the recalls 0, 0.01, …, 1; limits `MAX_DETECTIONS`, then
    that of tiled images.
    """
    result = evaluation.evaluator.eval
    assert result is not None
    return result["precision"], result["recall"]


def summarize(evaluation: CocoEvaluation) -> Metrics:
    """Return the metrics that `coco_metrics` describes."""
    precision, recall = precision_recall(evaluation)
    metrics: Metrics = {
        "AP": mean_or_none(precision[:, :, :, 0, -1]),
        "AP50": mean_or_none(precision[0, :, :, 0, -1]),
        "AP75": mean_or_none(precision[5, :, :, 0, -1]),
    }
    for area, name in enumerate(AREAS[1:], start=1):
        metrics[f"AP_{name}"] = mean_or_none(precision[:, :, :, area, -1])
    for limit, number in enumerate(MAX_DETECTIONS):
        metrics[f"AR{number}"] = mean_or_none(recall[:, :, 0, limit])
    for area, name in enumerate(AREAS[1:], start=1):
        metrics[f"AR_{name}"] = mean_or_none(recall[:, :, area, -1])
    classes = enumerate(evaluation.names)
    metrics["per_class"] = {name: mean_or_none(precision[:, :, k, 0, -1]) for k, name in classes}
    return metrics


def mean_or_none(values: np.ndarray) -> float | None:
    """Return the mean of the entries with ground truth; None if there are none."""
    values = values[values > -1]
    return float(values.mean()) if values.size else None


def _number_ids(ids: Iterable[Hashable], kind: str) -> dict[Any, int]:
    """Number the sorted ids 1, 2, …; the order decides between detections with equal scores."""
    numbers: dict[Any, int] = {}
    for record_id in sorted(ids, key=lambda record_id: (isinstance(record_id, str), record_id)):
        if record_id in numbers:
            raise UserError(f"ground truth: {kind} id {record_id!r} is used twice; give each {kind} its own id")
        numbers[record_id] = len(numbers) + 1
    return numbers


def _unique_names(categories: Sequence[Mapping[str, Any]], numbers: Mapping[Any, int]) -> list[str]:
    """Return the class names in the order of their numbers."""
    by_number = {numbers[category["id"]]: category for category in categories}
    names = {number: str(by_number[number].get("name", by_number[number]["id"])) for number in sorted(by_number)}
    count = Counter(names.values())
    return [name if count[name] == 1 else f"{name} ({by_number[number]['id']})" for number, name in names.items()]


def _annotation_columns(
    ground_truth: Mapping[str, Any], images: Mapping[Any, int], categories: Mapping[Any, int]
) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """Return the annotations as columns and as they are, without those of unlisted images or categories.

    pycocotools drops them, too.
    """
    rows, kept = [], []
    for index, annotation in enumerate(ground_truth["annotations"]):
        box = _box(annotation, f"ground truth: annotation {annotation.get('id', f'number {index}')}")
        image, category = annotation["image_id"], annotation["category_id"]
        if image in images and category in categories:
            area = annotation.get("area")
            area = box[2] * box[3] if area is None else float(area)
            rows.append((images[image], categories[category], *box, area, bool(annotation.get("iscrowd"))))
            kept.append(annotation)
    table = np.array(rows, dtype=np.float64).reshape(-1, 8)
    columns = {
        "image_ids": table[:, 0].astype(np.int64),
        "category_ids": table[:, 1].astype(np.int64),
        "boxes": np.ascontiguousarray(table[:, 2:6]),
        "area": np.ascontiguousarray(table[:, 6]),
        "iscrowd": table[:, 7].astype(np.int64),
    }
    return columns, kept


def _detection_table(
    results: Sequence[Mapping[str, Any]], images: Mapping[Any, int], categories: Mapping[Any, int]
) -> tuple[np.ndarray, list[Mapping[str, Any]]]:
    """Return (N, 7) float64, image, x, y, width, height, score, category; and the results that these rows are of."""
    rows, kept = [], []
    for index, result in enumerate(results):
        where = f"detection number {index}"
        box, image, category, score = _box(result, where), result["image_id"], result["category_id"], result["score"]
        if image not in images:
            raise UserError(f"{where}: image id {image!r} is not in the ground truth; use the split that was predicted")
        if not math.isfinite(score):
            raise UserError(f"{where}: the score is {score}; it must be finite")
        if category in categories:
            rows.append((images[image], *box, score, categories[category]))
            kept.append(result)
    return np.array(rows, dtype=np.float64).reshape(-1, 7), kept


def _size_record(number: int, height: int, width: int) -> dict[str, int]:
    return {"id": number, "height": height, "width": width}


def _box(record: Mapping[str, Any], where: str) -> list[float]:
    box = [float(value) for value in record["bbox"]]
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise UserError(f"{where}: bbox {box} is not x, y, width and height as finite numbers")
    return box
