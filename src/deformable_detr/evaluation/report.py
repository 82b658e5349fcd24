"""The evaluation report: one self-contained web page of one model, or of two models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..utils.errors import UserError
from ..utils.files import write_text
from ..utils.images import read_image
from ..utils.rle import thumbnail
from ..visualize.web.html import jpeg_data_uri, render_page
from .analysis import Matches, analyze, match
from .metrics import CocoEvaluation

if TYPE_CHECKING:
    from .evaluator import EvaluationResult

MAX_IMAGES = 16
LONGEST_SIDE = 640  # of an image in the page, in pixels
DEFAULT_THRESHOLD = 0.5  # for a model without any correct detection


def write_report(path: Path, results: Sequence[EvaluationResult], data: str, split: str) -> Path:
    """Write the HTML report of one model, or of two models on the same images.

    Args:
        path: The file to write.
        results: One result per model, from `evaluate_models`.
        data: Name of the dataset, to show in the page.
        split: Name of the split, to show in the page.

    Raises:
        UserError: The models were evaluated on different images or classes, or the file cannot be written.
    """
    write_text(path, render_report(results, data, split))
    return path


def render_report(results: Sequence[EvaluationResult], data: str, split: str) -> str:
    """Return the HTML that `write_report` writes."""
    first = results[0]
    for other in results[1:]:
        if other.coco.names != first.coco.names or other.coco.images != first.coco.images:
            raise UserError(
                f"{other.name}: its classes or images differ from those of {first.name}; compare models of one dataset"
            )
    with_masks = [(result, result.coco_masks) for result in results if result.coco_masks is not None]
    content = {
        "title": " and ".join(result.name for result in results) + f" on {data}",
        "data": data,
        "split": split,
        "images": len(first.coco.images),
        "names": first.coco.names,
        **_analyses([(result, result.coco) for result in results]),
        "masks": _analyses(with_masks) if with_masks else None,
    }
    return render_page("report", f"Evaluation of {content['title']}", content)


def _analyses(evaluated: Sequence[tuple[EvaluationResult, CocoEvaluation]]) -> dict[str, Any]:
    """Return "models" and "worst" of results with their evaluation of boxes or of masks."""
    models = [{"name": result.name, "speed": _speed(result), **analyze(coco)} for result, coco in evaluated]
    return {"models": models, "worst": _worst_images(evaluated, models)}


def _speed(result: EvaluationResult) -> dict[str, Any]:
    images = result.metrics["images"]
    return {
        "device": result.device,
        "images_per_second": result.metrics["images_per_second"],
        "model_milliseconds": 1000 * result.model_seconds / images if images else None,
    }


def _worst_images(
    evaluated: Sequence[tuple[EvaluationResult, CocoEvaluation]], models: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the images with the most errors of the first model at its best threshold, with boxes of all models."""
    evaluations = [coco for _, coco in evaluated]
    matches = [match(coco) for coco in evaluations]
    thresholds = [model["best"]["threshold"] if model["best"] else DEFAULT_THRESHOLD for model in models]
    errors = [_count_errors(c, m, t) for c, m, t in zip(evaluations, matches, thresholds, strict=True)]
    wrong, missed = errors[0]
    total = wrong + missed
    image_ids = {number: image_id for image_id, number in evaluations[0].images.items()}
    records = []
    for index in np.argsort(-total, kind="stable")[:MAX_IMAGES].tolist():
        if not total[index]:
            break
        record = _image_record(*evaluated[0], image_ids[index + 1], index + 1)
        record["models"] = [
            {"wrong": int(wrong[index]), "missed": int(missed[index]), **_detections(*pair, m, index + 1, t)}
            for pair, m, t, (wrong, missed) in zip(evaluated, matches, thresholds, errors, strict=True)
        ]
        records.append(record)
    return records


def _count_errors(coco: CocoEvaluation, matches: Matches, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of wrong detections and of missed objects per image."""
    length = len(coco.images) + 1
    selected = matches.counted & (coco.detections[:, 5] >= threshold)
    image_numbers = coco.detections[:, 0].astype(np.int64)
    wrong = np.bincount(image_numbers[selected & ~matches.hits], minlength=length)
    hits = np.bincount(image_numbers[selected & matches.hits], minlength=length)
    objects = np.bincount(coco.objects["image_ids"][matches.objects], minlength=length)
    return wrong[1:], (objects - hits)[1:]


def _image_record(result: EvaluationResult, coco: CocoEvaluation, image_id: Any, number: int) -> dict[str, Any]:
    """Return the image, if its file is known, and its objects as [x, y, w, h, class, is crowd].

    If there are masks, each object also has its RLE.
    """
    objects = coco.objects
    indices = np.flatnonzero(objects["image_ids"] == number)
    boxes = objects["boxes"][indices]
    labels, crowds = objects["category_ids"][indices] - 1, objects["iscrowd"][indices]
    columns = (boxes.round(1).tolist(), labels.tolist(), crowds.tolist())
    rows = [[*box, label, crowd] for box, label, crowd in zip(*columns, strict=True)]
    path = result.paths.get(image_id)
    if path is None:
        detections = coco.detections
        boxes = np.concatenate([boxes, detections[detections[:, 0] == number, 1:5]])
        width, height = np.ceil((boxes[:, :2] + boxes[:, 2:]).max(axis=0, initial=1)).tolist()
        return {"objects": rows, "name": str(image_id), "image": None, "width": width, "height": height}
    image = Image.fromarray(read_image(path).permute(1, 2, 0).numpy())
    if result.coco_masks is not None:
        rows = _with_masks(rows, indices, result.coco_masks.object_masks, (image.height, image.width))
    data_uri = jpeg_data_uri(image, LONGEST_SIDE)
    return {"objects": rows, "name": path.name, "image": data_uri, "width": image.width, "height": image.height}


def _with_masks(
    rows: Sequence[list[Any]], indices: np.ndarray, masks: Any, image_size: tuple[int, int] | None = None
) -> list[list[Any]]:
    """Return the rows, each with the mask of its index, at the size of the page's images; see `thumbnail`."""
    shown = [thumbnail(masks[index], LONGEST_SIDE, image_size) for index in indices.tolist()]
    return [[*row, mask] for row, mask in zip(rows, shown, strict=True)]


def _detections(
    result: EvaluationResult, coco: CocoEvaluation, matches: Matches, number: int, threshold: float
) -> dict[str, Any]:
    """Return an image's detections, best last, and which objects they match.

    A detection is [x, y, w, h, class, score, is hit, RLE if there are masks].
    """
    in_image = coco.detections[:, 0] == number
    rows = np.flatnonzero(in_image & matches.counted & (coco.detections[:, 5] >= threshold))
    rows = rows[np.argsort(coco.detections[rows, 5], kind="stable")]
    table, hits = coco.detections[rows], matches.hits[rows]
    detections = [
        [*box, int(label) - 1, round(score, 3), int(hit)]
        for box, (score, label), hit in zip(table[:, 1:5].round(1).tolist(), table[:, 5:].tolist(), hits, strict=True)
    ]
    if result.coco_masks is not None:
        detections = _with_masks(detections, rows, result.coco_masks.detected_masks)
    objects = np.flatnonzero(coco.objects["image_ids"] == number)
    return {"detections": detections, "found": np.isin(objects, matches.partners[rows]).astype(int).tolist()}
