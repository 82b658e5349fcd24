"""Training: steps, epochs, evaluation, checkpoints, and how a run begins, goes on and ends."""

from __future__ import annotations

import logging
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..device import pick_device
from ..errors import UserError
from ..structures import ImageBatch, Target
from .checkpoint import random_state, restore_random_state, update_state
from .failures import said_plainly
from .log import MetricsLog, Progress, duration
from .run_folder import RunFolder, fingerprint
from .step import StepFigures, Stepper
from .stopping import StopSignals, TrainingInterrupted

if TYPE_CHECKING:
    from ..data.coco import CocoDataset
    from ..model.detector import DeformableDETR

log = logging.getLogger(__name__)

_SAVE_SECONDS = 600.0  # of training between two saves inside a long epoch


def train_model(
    data: str | os.PathLike[str], out: str | os.PathLike[str], config: Config, resume: bool = False
) -> dict[str, Any]:
    """Trains a detector on the data set at `data` and leaves the run in the folder `out`.

    The classes of the training set become those of the model. The run ends after `config.train.epochs` epochs or
    `config.train.minutes` minutes, whichever comes first. Minutes count the training steps and the wait for their
    images; starting, evaluation and saving are not counted. The last model is always evaluated.

    resume: go on from the last checkpoint in `out`; a run that is finished is left as it is.

    Returns the figures of the last evaluation (`evaluation.evaluate`) with "best_AP", "epoch", "step", "images_seen"
    and "seconds" of training.
    Raises `UserError` for a folder or a data set that cannot be used, `NonFiniteLoss` for a NaN or infinite loss, and
    `TrainingInterrupted` (a SystemExit) after Ctrl-C or SIGTERM, when the last checkpoint is saved.
    """
    folder = RunFolder(out)
    with folder.held(resume), said_plainly(folder, config):
        return _train_in(folder, data, config, resume)


def _train_in(folder: RunFolder, data: str | os.PathLike[str], config: Config, resume: bool) -> dict[str, Any]:
    from ..data.check import check_for_training
    from ..data.coco import open_dataset, refuse_same_file
    from ..data.transforms import evaluation, training

    size = config.model.image_size, config.model.long_side
    if not resume:  # a run that goes on had its set checked; that it is the same one is seen below
        for line in check_for_training(data, config.data, *size):
            log.warning(line)
    split = config.data.train_split, config.data.val_split
    train_set = open_dataset(data, split[0], config.data, transform=training(*size, config.data))
    if not len(train_set):
        raise UserError(f"the training set at {data} has no images")
    validation = open_dataset(data, split[1], config.data, categories=train_set.categories, transform=evaluation(*size))
    refuse_same_file(train_set, validation)
    config = _with_classes(config, train_set)
    device = pick_device(config.train.device)
    restored = folder.restore(config, fingerprint(train_set)) if resume else None

    _seed(config.train.seed)
    model = _build(config, restored is not None).to(device)
    trainer = Trainer(config, model, train_set, validation, folder, Path(data).resolve().name)
    if restored is not None:
        trainer.restore(*restored)
    folder.write_config(config)
    return trainer.run("no checkpoint yet in this run: it starts anew" if resume and restored is None else None)


@dataclass
class Counters:
    """How far a run is.

    epoch: epochs done; batch: batches done of the one that runs; step: optimiser steps; seconds: of training;
    best: highest AP so far; evaluated_step: step of the last evaluation; metrics: its figures.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    best: float | None = None
    evaluated_step: int = -1
    metrics: dict[str, Any] | None = None


class Trainer:
    """One run: a model, its optimiser, its data, and the folder where it is kept."""

    def __init__(
        self,
        config: Config,
        model: DeformableDETR,
        train_set: CocoDataset,
        validation: CocoDataset,
        folder: RunFolder,
        data_name: str | None = None,
    ) -> None:
        from ..data.batching import loader

        self.data_name = data_name  # for the model card
        self.config, self.model, self.validation, self.folder = config, model, validation, folder
        train = config.train
        self.data_fingerprint = fingerprint(train_set)
        self.loader = loader(train_set, train.batch_size, config.data.workers, shuffle=True, seed=train.seed)
        self.batches = len(self.loader)
        self.stepper = Stepper(model, train)
        self.counters = Counters()
        self.stop = StopSignals()
        self._history: defaultdict[str, list[float]] = defaultdict(list)  # since the last line of the log
        self._logged = (0, 0.0)  # images and seconds at that line
        self._loss = math.nan  # smoothed, for the eye

    # --- how far ------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """0..1, part of the run that is done, by epochs or minutes, whichever ends first."""
        train, done = self.config.train, self.counters
        epochs = (done.epoch + done.batch / self.batches) / train.epochs if train.epochs else 0.0
        minutes = done.seconds / (60 * train.minutes) if train.minutes else 0.0
        return min(1.0, max(epochs, minutes))

    def run(self, note: str | None = None) -> dict[str, Any]:
        """Trains to the end and returns the figures; says `note` first."""
        done = self.counters
        with Progress() as self.bar:
            if note:
                self.bar.say(note)
            if self.progress >= 1 and done.evaluated_step == done.step:
                self.bar.say(f"the run in {self.folder.path} is finished: {done.epoch} epochs, {done.step} steps")
                return self._summary()
            with self.stop, MetricsLog(self.folder.path, done.step) as self.log:
                while True:
                    if self._evaluation_due():
                        self._evaluate()
                    if self.progress >= 1:
                        break
                    self._epoch()
                    if not self._evaluation_due():
                        self._say_epoch()
        return self._summary()

    def _evaluation_due(self) -> bool:
        """At the end of the run and of every `eval_every`-th epoch; also for a run that was killed before it."""
        done = self.counters
        whole = done.step > 0 and done.batch == 0 and done.epoch % self.config.train.eval_every == 0
        return (self.progress >= 1 or whole) and done.evaluated_step != done.step

    def _summary(self) -> dict[str, Any]:
        done = self.counters
        facts = {name: getattr(done, name) for name in ("epoch", "step", "images_seen", "seconds")}
        return {**(done.metrics or {}), "best_AP": done.best, **facts}

    # --- steps --------------------------------------------------------------------------------------------------

    def _epoch(self) -> None:
        """The rest of the running epoch, or as much of it as there is time for; then the last checkpoint is saved."""
        done = self.counters
        self.model.train()
        saved = done.seconds
        batches = self._batches()
        mark = time.perf_counter()
        for batch, targets in batches:
            figures = self.stepper.step(batch, targets, done.step, self.progress)
            self._account(figures)
            done.batch += 1
            done.step += 1
            done.images_seen += len(targets)
            done.seconds += time.perf_counter() - mark
            self._show()
            if self.stop.received is not None:
                self._interrupt()
            if self.progress >= 1:
                break
            if done.seconds - saved > _SAVE_SECONDS:
                self.save()
                saved = done.seconds
            mark = time.perf_counter()
        if done.batch == self.batches:
            done.epoch, done.batch = done.epoch + 1, 0
        self.save()
        if self.stop.received is not None:
            self._interrupt()

    def _batches(self) -> Iterator[tuple[ImageBatch, list[Target]]]:
        """The batches of the running epoch that are not done yet, in the order that the seed and the epoch give."""
        self.loader.sampler.set_epoch(self.counters.epoch)
        batches = iter(self.loader)
        for _ in range(self.counters.batch):
            next(batches)
        return self._until_interrupted(batches)

    def _until_interrupted(
        self, batches: Iterator[tuple[ImageBatch, list[Target]]]
    ) -> Iterator[tuple[ImageBatch, list[Target]]]:
        try:
            yield from batches
        except RuntimeError:
            # Ctrl-C reaches the loader's processes too, and PyTorch complains that they are gone.
            if self.stop.received is None:
                raise
            self._interrupt()

    def _account(self, figures: StepFigures | None) -> None:
        """Adds a step's figures to the log; a line every `log_every` steps has the means since the line before."""
        if figures is None:
            return
        loss, done = figures.values["loss"], self.counters
        self._loss = loss if math.isnan(self._loss) else 0.95 * self._loss + 0.05 * loss
        for name, value in figures.values.items():
            if math.isfinite(value):  # a gradient may overflow in fp16
                self._history[name].append(value)
        if figures.step % self.config.train.log_every:
            return
        images, seconds = done.images_seen - self._logged[0], done.seconds - self._logged[1]
        facts = {
            "step": figures.step, "epoch": done.epoch, "progress": round(self.progress, 6),
            "images_seen": done.images_seen, "seconds": round(done.seconds, 3),
            "images_per_second": round(images / max(seconds, 1e-9), 3), "lr": figures.lr,
        }  # fmt: skip
        self.log.write("train", facts | {name: sum(values) / len(values) for name, values in self._history.items()})
        self._logged = (done.images_seen, done.seconds)
        self._history.clear()

    # --- between the steps --------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        from ..evaluation.run import evaluate_dataset

        train, done = self.config.train, self.counters
        try:
            self.stop.at_once = True  # all is saved: a signal need not wait until the evaluation is over
            self.stop.check()
            metrics = evaluate_dataset(
                self.stepper.learned, self.validation, train.batch_size, self.config.data.workers, progress=False
            )
        except TrainingInterrupted:
            self._say_interrupted()
            raise
        finally:
            self.stop.at_once = False
        figure = metrics["AP"]
        better = done.best is None or (figure is not None and figure > done.best)
        done.metrics, done.evaluated_step = metrics, done.step
        if better:
            done.best = figure
            from ..weights.card import Facts

            figures = {name: value for name, value in metrics.items() if name.startswith(("AP", "AR"))}
            self.folder.export(self.stepper.learned, Facts(self.data_name, figures, self.config))
            self.save(best=True)
        update_state(self.folder.last, self._state())
        facts = {"step": done.step, "epoch": done.epoch, "images_seen": done.images_seen}
        self.log.write("evaluation", {**facts, "seconds": round(done.seconds, 3), **metrics, "best_AP": done.best})
        self._say_epoch()
        if self.stop.received is not None:
            self._interrupt()

    def save(self, best: bool = False) -> None:
        """Makes the present state the last (or the best) checkpoint, once the last step proved good."""
        self._account(self.stepper.settle())
        self.folder.save(self.stepper.tensors(), self._state(), best)

    def _state(self) -> dict[str, Any]:
        return {
            "counters": asdict(self.counters),
            "batches": self.batches,
            "progress": self.progress,
            "model": self.config.model.model_dump(mode="json"),
            "data": self.data_fingerprint,
            "scaler": self.stepper.scaler.state_dict(),
            "random": random_state(),
        }

    def restore(self, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Goes back to where a checkpoint was saved."""
        self.stepper.load(tensors)
        self.counters = done = Counters(**state["counters"])
        # With another batch size, as much of the epoch is done as before.
        done.batch = done.batch * self.batches // state["batches"]
        if done.batch == self.batches:
            done.epoch, done.batch = done.epoch + 1, 0
        if self.stepper.scaler.is_enabled() and state["scaler"]:
            self.stepper.scaler.load_state_dict(state["scaler"])
        self._logged = (done.images_seen, done.seconds)
        restore_random_state(state["random"])

    def _interrupt(self) -> None:
        self.save()
        self._say_interrupted()
        self.stop.check()

    def _say_interrupted(self) -> None:
        self.bar.say(f"interrupted at step {self.counters.step}; saved in {self.folder.last}: go on with --resume")

    # --- what the terminal shows --------------------------------------------------------------------------------

    def _left(self) -> str:
        progress, seconds = self.progress, self.counters.seconds
        return duration(seconds * (1 - progress) / progress) if progress else "?"

    def _show(self) -> None:
        done, train = self.counters, self.config.train
        speed = (done.images_seen - self._logged[0]) / max(done.seconds - self._logged[1], 1e-9)
        epochs = f"{done.epoch + 1}/{train.epochs}" if train.epochs else f"{done.epoch + 1}"
        facts = {"epoch": epochs, "loss": f"{self._loss:.3f}", "AP": _figure(done.best)}
        self.bar.show(self.progress, {**facts, "images/s": f"{speed:.1f}", "left": self._left()})

    def _say_epoch(self) -> None:
        done, train = self.counters, self.config.train
        epochs = f"{done.epoch}/{train.epochs}" if train.epochs else f"{done.epoch}"
        line = f"epoch {epochs}: step {done.step}, loss {self._loss:.3f}"
        if done.evaluated_step == done.step and done.metrics:
            metrics = done.metrics
            line += f", AP {_figure(metrics['AP'])}, AP50 {_figure(metrics['AP50'])}, best AP {_figure(done.best)}"
        speed = done.images_seen / max(done.seconds, 1e-9)
        self.bar.say(f"{line}, {speed:.1f} images/s, {duration(done.seconds)} trained, {self._left()} left")


def _with_classes(config: Config, dataset: CocoDataset) -> Config:
    categories = dataset.categories
    classes = {
        "num_classes": len(categories),
        "class_names": tuple(category.name for category in categories),
        "category_ids": tuple(category.id for category in categories),
    }
    return config.merged({"model": classes}, "the training set")


def _build(config: Config, restored: bool) -> DeformableDETR:
    from ..model.detector import DeformableDETR
    from ..weights.transfer import begin

    if config.train.weights and not restored:
        return begin(config.model, config.train.weights)
    return DeformableDETR(config.model.without_download() if restored else config.model)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _figure(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"
