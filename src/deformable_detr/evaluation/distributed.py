"""Evaluation by all processes of a run: the figures of one process, to the bit."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from ..data.dataset import CocoDataset
    from ..distributed.context import DistributedContext
    from .evaluator import Keep


def evaluate_together(
    model: nn.Module,
    dataset: CocoDataset,
    batch_size: int,
    workers: int,
    world: DistributedContext,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """What `evaluation.run.evaluate_dataset` gives, for every process; each has the same model and calls it.

    The batches are those of one process, dealt out in turn: an image's padding, which its detections depend on, stays.
    Detections are counted by the first process, in the order of the data set, as ties between scores go by it;
    `keep` is called there.
    """
    from .evaluator import _detect
    from .metrics import coco_metrics

    start = time.perf_counter()
    with world.sync_errors():
        part = (world.rank, world.size)
        found = _detect(model, dataset, len(dataset), batch_size, workers, progress=False, part=part)[0]
    parts = world.collect(found)
    seconds = time.perf_counter() - start

    def figures() -> dict[str, Any]:
        place = {int(number): index for index, number in enumerate(dataset.image_ids)}
        everything = sorted((one for part in parts or () for one in part), key=lambda one: place[one["image_id"]])
        count = len(dataset)
        if keep is not None:
            keep(dataset, everything)
        metrics = coco_metrics(dataset.ground_truth, everything)
        return {**metrics, "images": count, "images_per_second": count / seconds}

    return world.on_rank_zero(figures)
