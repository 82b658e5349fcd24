"""`deformable-detr predict DATASET --coco FILE`: COCO results for one split of a dataset."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import UserError
from ..utils.files import prepare_files, write_json
from ..utils.terminal import echo

if TYPE_CHECKING:
    from ..data.dataset import CocoDataset
    from ..predict.predictor import Detector
    from .predict import PredictOptions

ANNOTATIONS = {".json", ".jsonl", ".yaml", ".yml", ".xml", ".csv", ".tsv", ".parquet"}


def find_dataset(source: Path, split: str | None) -> bool:
    """Return whether a source is a dataset with the split (default: val). Other folders and images are not.

    Raises:
        UserError: It is an annotation file that is not one, or a folder with the option --split or without images
            directly in it.
    """
    from ..config.schema import DataConfig
    from ..data.discovery import is_image
    from ..data.formats import find_source

    described = source.suffix.lower() in ANNOTATIONS or (split is not None and source.is_dir())
    if not described and not source.is_dir():
        return False
    try:
        find_source(source, split or "val", DataConfig())
    except UserError:
        if described:
            raise
        with suppress(OSError):
            if any(is_image(name) for name in os.listdir(source)):
                return False
        raise
    return True


def predict_split(model: Detector, data: Path, options: PredictOptions) -> None:
    """Write COCO results for one split of a dataset: the detections that `evaluate` counts.

    Raises:
        UserError: An option is for other sources, or the dataset or the file cannot be used.
    """
    from ..evaluation import evaluator

    if option := next((name for name in ("out", "json", "camera") if getattr(options, name) is not None), None):
        raise UserError(f"--{option} is not for a dataset: name image files or folders, or leave it out")
    assert options.coco is not None
    prepare_files({"--coco": options.coco})
    dataset = evaluator.open_eval_dataset(model, data, options.split or "val")
    top_k, count = options.top_k or evaluator.TOP_K, len(dataset)
    sizes = evaluator.BATCH_SIZE, evaluator.WORKERS
    results = evaluator.detect(model, dataset, count, options.tiling, *sizes, True, top_k=top_k)[0]
    results = [result for result in results if result["score"] >= options.min_score]
    rows = _in_file_ids(dataset, results)
    write_json(options.coco, rows)
    left_out = (
        f"; {others} of classes that it does not list are left out" if (others := len(results) - len(rows)) else ""
    )
    echo(f"{options.coco}: {len(rows)} detections in {count} images of {dataset.annotation_file}{left_out}")


def _in_file_ids(dataset: CocoDataset, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return COCO results with the ids of the annotation file; with the file names too if it has no ids."""
    from ..data.records import TextId

    images = {record["id"]: record for record in dataset.ground_truth["images"]}
    categories = dict(dataset.file_category_ids)
    rows = []
    for result in results:
        image = images[result["image_id"]]
        name = {} if dataset.source.format == "coco" else {"file_name": image["file_name"]}
        if (category := categories.get(result["category_id"])) is not None:
            rows.append({**result, "image_id": TextId.in_file(image["id"]), **name, "category_id": category})
    return rows
