"""The gallery of a training run: detections on a few validation images, evaluation by evaluation."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..utils.files import replace_file
from ..utils.images import read_image
from ..utils.rle import thumbnail
from ..visualize.web.html import jpeg_data_uri

if TYPE_CHECKING:
    from ..data.dataset import CocoDataset

log = logging.getLogger(__name__)

FOLDER = "gallery"
MAX_IMAGES = 6
LONGEST_SIDE = 480  # of an image, in pixels
MAX_BOXES = 20  # per image, best scores first
MIN_SCORE = 0.05


def add_to_gallery(
    run_dir: Path, step: int, epoch: int, dataset: CocoDataset, results: Sequence[dict[str, Any]]
) -> None:
    """Add the detections of one evaluation, as COCO results, to the gallery of a run; warn if it cannot be written.

    A detection is [x, y, w, h, label, score], with a mask also its RLE at the size of the gallery's images.
    """
    folder = run_dir / FOLDER
    count = min(MAX_IMAGES, len(dataset))
    indices = np.unique(np.linspace(0, len(dataset) - 1, count).round().astype(int)).tolist()
    image_ids = [int(dataset.image_ids[index]) for index in indices]
    labels = {category.id: label for label, category in enumerate(dataset.categories)}
    boxes: dict[int, list[tuple[list[float], Any]]] = defaultdict(list)
    for result in results:
        if result["image_id"] in image_ids and result["score"] >= MIN_SCORE:
            box = [round(value, 1) for value in result["bbox"]]
            row = [*box, labels[result["category_id"]], round(result["score"], 3)]
            boxes[result["image_id"]].append((row, result.get("segmentation")))
    best = [sorted(boxes[image_id], key=lambda pair: -pair[0][-1])[:MAX_BOXES] for image_id in image_ids]
    best = [[_with_mask(row, mask) for row, mask in rows] for rows in best]
    record = {"step": step, "epoch": epoch, "ids": image_ids, "images": best}
    try:
        if [index["ids"] for index in read_json_lines(folder / "images.json")] != [image_ids]:
            folder.mkdir(parents=True, exist_ok=True)
            images = _describe_images(dataset, indices, image_ids)
            replace_file(folder / "images.json", json.dumps(images, ensure_ascii=False))
        with open(folder / "predictions.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:  # training continues without the gallery
        log.warning("the gallery %s cannot be written: %s", folder, error.strerror or error)


def read_gallery(run_dir: Path, steps: Sequence[int]) -> dict[str, Any] | None:
    """Return the images.json of a run's gallery with "evaluations", its records of these steps; None without one.

    If a step was evaluated twice, as after a crash, the last record counts.
    """
    folder = run_dir / FOLDER
    content = next(iter(read_json_lines(folder / "images.json")), None)
    if content is None:
        return None
    records = {
        record["step"]: {key: record[key] for key in ("step", "epoch", "images")}
        for record in read_json_lines(folder / "predictions.jsonl")
        if record["step"] in steps and record["ids"] == content["ids"]
    }
    return {**content, "evaluations": [records[step] for step in sorted(records)]}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a file, which may be missing; a killed process can leave an incomplete line."""
    records = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with suppress(ValueError):
                records.append(json.loads(line))
    return records


def _describe_images(dataset: CocoDataset, indices: Sequence[int], image_ids: Sequence[int]) -> dict[str, Any]:
    """Return the images and their objects as [x, y, w, h, label] and the RLE of those with masks, without crowds."""
    labels = {category.id: label for label, category in enumerate(dataset.categories)}
    objects: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in image_ids}
    for annotation in dataset.ground_truth["annotations"]:
        if annotation["image_id"] in objects and not annotation["iscrowd"]:
            objects[annotation["image_id"]].append(annotation)
    images = []
    for index, image_id in zip(indices, image_ids, strict=True):
        path = dataset.path(index)
        image = Image.fromarray(read_image(path).permute(1, 2, 0).numpy())
        rows = []
        for annotation in objects[image_id]:
            row = [*(round(float(value), 1) for value in annotation["bbox"]), labels[annotation["category_id"]]]
            rows.append(_with_mask(row, annotation.get("segmentation"), (image.height, image.width)))
        record = {"name": path.name, "width": image.width, "height": image.height}
        images.append({**record, "image": jpeg_data_uri(image, LONGEST_SIDE), "objects": rows})
    return {"ids": list(image_ids), "names": [category.name for category in dataset.categories], "images": images}


def _with_mask(row: list[Any], mask: Any, image_size: tuple[int, int] | None = None) -> list[Any]:
    """Return a row with its mask, if there is one, at the size of the gallery's images; see `thumbnail`."""
    return [*row, thumbnail(mask, LONGEST_SIDE, image_size)] if mask else row
