"""How a run begins: its folder, its classes, its batch, its model, its random numbers."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..config.schema import Config
from ..distributed.context import DistributedContext
from ..utils.failures import explain_machine_errors
from .checkpoint import generations
from .run_dir import RunDir

if TYPE_CHECKING:
    from .run_dir import RunDir

if TYPE_CHECKING:
    from ..data.dataset import CocoDataset
    from ..detector import DeformableDETR

log = logging.getLogger(__name__)


@contextmanager
def held(folder: RunDir, resume: bool, world: DistributedContext) -> Iterator[None]:
    """The run folder is the first process's."""
    with ExitStack() as stack:
        with world.sync_errors():
            if world.is_rank_zero:
                stack.enter_context(folder.held(resume))
        yield


def same_batch(config: Config, state: Mapping[str, Any], world: DistributedContext) -> Config:
    """A run of one process that goes on in several keeps its batch, where nobody said another."""
    if world.size == 1 or config.train.total_batch_size is not None or "total_batch_size" not in state:
        return config
    batch = {
        "total_batch_size": state["total_batch_size"],
        "base_batch_size": config.train.base_batch_size or config.train.batch_size,
    }
    return config.updated({"train": batch})


def with_classes(config: Config, dataset: CocoDataset) -> Config:
    categories = dataset.categories
    classes = {
        "num_classes": len(categories),
        "class_names": tuple(category.name for category in categories),
        "category_ids": tuple(category.id for category in categories),
    }
    return config.updated({"model": classes}, "the training set")


def build(config: Config, restored: bool, speaks: bool = True) -> DeformableDETR:
    from ..detector import DeformableDETR
    from ..weights.convert import not_convertible
    from ..weights.finetune import begin

    if speaks and not restored and (note := not_convertible(config.model)):
        log.warning(note)
    if config.train.weights and not restored:
        return begin(config.model, config.train.weights, print if speaks else lambda line: None, DeformableDETR)
    return DeformableDETR(config.model.without_pretrained_backbone() if restored else config.model)


def seed_all(*numbers: int) -> None:
    """Starts all generators; one number as it is, several mixed."""
    seed = numbers[0] if len(numbers) == 1 else int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def machine_errors_as_user_errors(folder: RunDir, config: Config) -> AbstractContextManager[None]:
    """Turns what the machine does to the training within into a `UserError`: the cause, the mend, what is saved.

    That is: memory of the device or of the machine full; a loader's process killed; files that cannot be written or
    read. Other errors, which are faults of the program, pass as they are.
    """
    train, model = config.train, config.model
    smaller = (
        f"use a smaller --batch-size (now {train.batch_size}; --total-batch-size keeps what the optimizer sees) or "
        f"--image-size (now {model.image_size}), or --set model.gradient_checkpointing=true"
    )
    return explain_machine_errors(train.batch_size, config.data.workers, smaller, lambda: f"; {_saved(folder)}")


def _saved(folder: RunDir) -> str:
    if generations(folder.last):
        return "the last checkpoint is good: go on with --resume"
    return f"nothing was saved yet: start again{' with --resume' if folder.begun else ''}"
