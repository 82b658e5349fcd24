"""The report of an evaluation: one self-contained page, of one model or of two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..utils.errors import UserError
from ..utils.files import write_text
from ..utils.images import read_image
from ..visualize.web.html import fill, picture
from .analysis import Statuses, analyze, match
from .evaluator import Evaluated
from .metrics import Counted

MOST_PICTURES = 16
LONGEST_SIDE = 640  # of a picture in the page, in pixels
THRESHOLD = 0.5  # of pictures, where no score is better than another because nothing was right


def write_report(path: Path, evaluated: Sequence[tuple[str, Evaluated]], data: str, split: str) -> Path:
    """Writes the page of one model, or of two on the same images.

    evaluated: (name, what `evaluation.detect` gave) of each; data, split: what it was measured on.
    Raises UserError for two models that were not measured on the same images and classes, and where the file cannot be
    written.
    """
    write_text(path, report(evaluated, data, split))
    return path


def report(evaluated: Sequence[tuple[str, Evaluated]], data: str, split: str) -> str:
    """The HTML of `write_report`."""
    first = evaluated[0][1]
    for name, other in evaluated[1:]:
        if other.counted.names != first.counted.names or other.counted.images != first.counted.images:
            raise UserError(f"{name}: other classes or images than {evaluated[0][0]}'s; compare models of one set")
    models = []
    for name, one in evaluated:
        images, seconds = one.metrics["images"], one.model_seconds
        speed = {
            "device": one.device,
            "images_per_second": one.metrics["images_per_second"],
            "model_milliseconds": 1000 * seconds / images if images else None,
        }
        models.append({"name": name, "speed": speed, **analyze(one.counted)})
    content = {
        "title": " and ".join(name for name, _ in evaluated) + f" on {data}",
        "data": data,
        "split": split,
        "images": len(first.counted.images),
        "names": first.counted.names,
        "models": models,
        "pictures": _pictures([one for _, one in evaluated], models),
    }
    title = f"Evaluation of {content['title']}"
    scripts = ["elements.js", "charts.js", "report.js"]
    return fill("deformable_detr.visualize.web", "report.html", title, content, ["style.css"], scripts)


def _pictures(evaluated: Sequence[Evaluated], models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The images with the most errors of the first model, at its threshold; where two are as bad, the first."""
    statuses = [match(one.counted) for one in evaluated]
    thresholds = [model["best"]["threshold"] if model["best"] else THRESHOLD for model in models]
    errors = [
        _errors(one.counted, status, threshold)
        for one, status, threshold in zip(evaluated, statuses, thresholds, strict=True)
    ]
    wrong, missed = errors[0]
    total = wrong + missed
    worst = np.argsort(-total, kind="stable")[:MOST_PICTURES]
    identities = {number: identity for identity, number in evaluated[0].counted.images.items()}
    shown = []
    for place in worst.tolist():
        if not total[place]:
            break
        number = place + 1
        record = _objects(evaluated[0], identities[number], number, statuses[0])
        record["models"] = [
            {"wrong": int(error[0][place]), "missed": int(error[1][place]),
             **_found(one.counted, status, number, threshold)}
            for one, status, threshold, error in zip(evaluated, statuses, thresholds, errors, strict=True)
        ]  # fmt: skip
        shown.append(record)
    return shown


def _errors(counted: Counted, statuses: Statuses, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Wrong detections and missed objects of each image, by number."""
    images = len(counted.images) + 1
    chosen = statuses.counts & (counted.detections[:, 5] >= threshold)
    places = counted.detections[:, 0].astype(np.int64)
    wrong = np.bincount(places[chosen & ~statuses.hits], minlength=images)
    right = np.bincount(places[chosen & statuses.hits], minlength=images)
    objects = np.bincount(counted.objects["image_ids"][statuses.real], minlength=images)
    return wrong[1:], (objects - right)[1:]


def _objects(evaluated: Evaluated, identity: Any, number: int, statuses: Statuses) -> dict[str, Any]:
    """The image, where it can still be read, and its objects: [x, y, w, h, class, whether it is a crowd]."""
    counted = evaluated.counted
    rows = np.flatnonzero(counted.objects["image_ids"] == number)
    boxes = counted.objects["boxes"][rows]
    record: dict[str, Any] = {
        "name": str(identity),
        "objects": [
            [*np.round(box, 1).tolist(), int(category) - 1, int(crowd)]
            for box, category, crowd in zip(
                boxes, counted.objects["category_ids"][rows], counted.objects["iscrowd"][rows], strict=True
            )
        ],
    }
    path = evaluated.paths.get(identity)
    if path is None:
        found = counted.detections[counted.detections[:, 0] == number, 1:5]
        corners = np.concatenate([boxes, found])
        corners = corners[:, :2] + corners[:, 2:]
        width, height = np.ceil(corners.max(axis=0, initial=1)).tolist()
        return record | {"picture": None, "width": width, "height": height}
    pixels = read_image(path)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    shown = {"name": path.name, "picture": picture(image, LONGEST_SIDE), "width": image.width, "height": image.height}
    return record | shown


def _found(counted: Counted, statuses: Statuses, number: int, threshold: float) -> dict[str, Any]:
    """The detections from the threshold up, best last: [x, y, w, h, class, score, whether it is right]; and which
    objects, by their place in the record, were found.
    """
    of_image = counted.detections[:, 0] == number
    rows = np.flatnonzero(of_image & statuses.counts & (counted.detections[:, 5] >= threshold))
    rows = rows[np.argsort(counted.detections[rows, 5], kind="stable")]
    detections = [
        [*counted.detections[row, 1:5].round(1).tolist(), int(counted.detections[row, 6]) - 1,
         round(float(counted.detections[row, 5]), 3), int(statuses.hits[row])]
        for row in rows.tolist()
    ]  # fmt: skip
    objects = np.flatnonzero(counted.objects["image_ids"] == number)
    right = np.isin(objects, statuses.partners[rows])
    return {"detections": detections, "found": right.astype(int).tolist()}
