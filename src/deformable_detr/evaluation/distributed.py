"""Evaluation by all processes of a training run, with exactly the metrics of one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from .evaluator import detect_images
from .metrics import Metrics, coco_metrics

if TYPE_CHECKING:
    from ..data.dataset import CocoDataset
    from ..distributed.context import DistributedContext


def evaluate_distributed(
    model: nn.Module,
    dataset: CocoDataset,
    batch_size: int,
    workers: int,
    context: DistributedContext,
    on_results: Callable[[CocoDataset, list[dict[str, Any]]], object] = lambda dataset, results: None,
) -> Metrics:
    """Return the metrics of `evaluate` in every process. All processes call it with the same model.

    Each process takes every n-th batch, so that images are padded as in one process. Rank 0 calls `on_results` and
    counts the detections in the order of the dataset, which decides between equal scores.
    """
    start = time.perf_counter()
    with context.sync_errors():
        shard = (context.rank, context.world_size)
        part = detect_images(model, dataset, len(dataset), batch_size, workers, progress=False, shard=shard)[0]
    parts = context.all_gather_object(part)
    seconds = time.perf_counter() - start

    def metrics_of_all_parts() -> Metrics:
        order = {int(image_id): index for index, image_id in enumerate(dataset.image_ids)}
        results = sorted((row for rows in parts for row in rows), key=lambda row: order[row["image_id"]])
        on_results(dataset, results)
        metrics = coco_metrics(dataset.ground_truth, results)
        return {**metrics, "images": len(dataset), "images_per_second": len(dataset) / seconds}

    return context.on_rank_zero(metrics_of_all_parts)
