"""The training loop: epochs of steps, evaluation, checkpoints, resume and graceful shutdown."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..config.schema import Config
from ..data.dataloader import Batch, LoaderOptions, build_dataloader, mix_seeds
from ..data.dataset import CocoDataset, ensure_distinct_splits, open_dataset
from ..data.mosaic import MosaicDataset
from ..data.multi_scale import MultiScaleBatches
from ..data.source import AnnotationCache
from ..data.tiles import TiledDataset
from ..data.transforms import EvalTransform, train_transform
from ..data.validate import check_for_training
from ..distributed.context import DistributedContext
from ..distributed.launch import restarted
from ..utils.errors import UserError
from ..utils.tiles import check_tiling
from . import setup
from .checkpoint import random_state, restore_random_state, update_state
from .logger import TrainingLogger, TrainState
from .optimizer import scaled_lr, total_batch_size
from .run_dir import RunDir
from .signals import GracefulShutdown, TrainingInterrupted
from .step import BatchStats, TrainStep, count_objects

if TYPE_CHECKING:
    from ..predict.predictor import Detector

log = logging.getLogger(__name__)

_SAVE_SECONDS = 600.0  # of training between two checkpoints in a long epoch


def train_model(
    data: str | os.PathLike[str], out: str | os.PathLike[str], config: Config, resume: bool = False
) -> dict[str, Any]:
    """Train a detector on the dataset at `data`; the run and its best model are saved in the folder `out`.

    The model gets the classes of the training set. The run ends after `train.epochs` or `train.minutes` of training
    steps, whichever comes first. The last model is always evaluated. With `resume`, it continues from the last
    checkpoint; a finished run is left unchanged.

    Returns:
        The metrics of the last evaluation with "best_AP" (of masks, if the model and the validation set have them),
        "epoch", "step", "images_seen" and "seconds" of training.

    Raises:
        UserError: The folder or the dataset cannot be used.
        NonFiniteLoss: The loss or gradient is NaN or infinite.
        TrainingInterrupted: Ctrl-C, SIGTERM, SIGHUP or SIGUSR1, after saving a checkpoint.
    """
    run_dir = RunDir(out)
    with DistributedContext(config.train.device) as context, setup.explain_errors(run_dir, config), ExitStack() as lock:
        resume = context.on_rank_zero(lambda: resume or (restarted() and run_dir.started))
        with context.sync_errors():
            if context.is_rank_zero:
                lock.enter_context(run_dir.lock(resume))
        lock.enter_context(torch.random.fork_rng([context.device] if context.device.type == "cuda" else []))
        trainer, note = _prepare(data, run_dir, config, resume, context)
        return trainer.run(note)


def _prepare(
    data: str | os.PathLike[str], run_dir: RunDir, config: Config, resume: bool, context: DistributedContext
) -> tuple[Trainer, str]:
    """Return the trainer of a new or resumed run and what to print first."""
    train_set, val_set = _open_datasets(data, config, resume, context)
    with context.sync_errors():
        samples = setup.training_samples(train_set, config)
        count, line = setup.sampling_note(samples, config.data)
        unit = "samples per epoch" if line else "training images"
        config, note = setup.resolve_auto(setup.with_classes(config, train_set), count, unit)
        note = "\n".join(text for text in (line, note) if text)
    restore = run_dir.checkpoints.restore
    checkpoint = context.on_rank_zero(lambda: restore(config, train_set.fingerprint) if resume else None)
    resumed = checkpoint is not None
    if resume and not resumed:
        note = "no checkpoint in this run yet: it starts from the beginning"
    if resumed and context.world_size > 1 and config.train.total_batch_size is None:
        config = setup.fix_batch_size(config, checkpoint[1]["total_batch_size"])  # also after a run of one process

    torch.manual_seed(config.train.seed)
    model = context.local_rank_zero_first(lambda: setup.build_model(config, resumed, context.is_rank_zero))
    datasets, data_name = (samples, val_set), Path(data).resolve().name
    trainer = Trainer(config, model.to(context.device), datasets, run_dir, data_name, context)
    if checkpoint is not None:
        trainer.load_checkpoint(*checkpoint)
    elif not context.is_rank_zero:
        torch.manual_seed(mix_seeds(config.train.seed, context.rank))  # for dropout
    context.on_rank_zero(lambda: run_dir.write_config(trainer.config))
    return trainer, note


def _open_datasets(
    data: str | os.PathLike[str], config: Config, resume: bool, context: DistributedContext
) -> tuple[CocoDataset, CocoDataset]:
    """Open and validate the training and the validation split. A resumed run was validated when it started."""
    rule, masks = config.model.resize_rule, config.model.masks
    cache = AnnotationCache(masks)  # each annotation file is parsed once
    if not resume:
        queries = config.model.num_queries
        for line in context.on_rank_zero(lambda: list(check_for_training(data, config.data, rule, cache, queries))):
            log.warning(line)
    with context.sync_errors():
        transform = train_transform(rule, config.data)
        train_set = open_dataset(data, config.data.train_split, config.data, None, transform, cache, masks)
        if masks and context.is_rank_zero and (note := setup.check_masks(train_set)):
            log.warning(note)
        transform = EvalTransform(rule)
        val_set = open_dataset(data, config.data.val_split, config.data, train_set.categories, transform, cache, masks)
        ensure_distinct_splits(train_set, val_set, data)
        if context.is_rank_zero:
            val_set.load_ground_truth(cache)
    return train_set, val_set


class Trainer:
    """One run: a model, its datasets, and the folder where it is saved."""

    def __init__(
        self,
        config: Config,
        model: Detector,
        datasets: tuple[CocoDataset | TiledDataset, CocoDataset],
        run_dir: RunDir,
        data_name: str,
        context: DistributedContext,
    ) -> None:
        self.model, self.run_dir, self.data_name, self.context = model, run_dir, data_name, context
        train_set, self.val_set = datasets
        self.data_fingerprint = train_set.fingerprint
        self.total_batch_size = total_batch_size(config.train, self.context.world_size)
        self.lr, self._lr_note = scaled_lr(config.train, self.total_batch_size)
        if self.context.world_size > 1 and config.train.total_batch_size is None:
            config = setup.fix_batch_size(config, self.total_batch_size)
        self.config, train = config, config.train
        options = LoaderOptions(
            train.batch_size, config.data.workers, shuffle=True, seed=train.seed,
            total_batch_size=self.total_batch_size, rank=self.context.rank, world_size=self.context.world_size,
            aspect_ratio_grouping=config.data.aspect_ratio_grouping,
            sampling=train_set.sampling(config.data.repeat_threshold),
        )  # fmt: skip
        mosaic_prob = config.data.mosaic_prob
        self.loader = build_dataloader(MosaicDataset(train_set, mosaic_prob) if mosaic_prob else train_set, options)
        self.steps_per_epoch = self.loader.sampler.num_steps
        multi_scale = MultiScaleBatches.from_config(config.model, config.data.train_scales, train.seed)
        with self.context.sync_errors():
            self.train_step = TrainStep(model, train.replace(lr=self.lr), self.context, multi_scale)
            self.logger = TrainingLogger(train, run_dir.path, self.context.is_rank_zero)
        self.state = TrainState()
        self.shutdown = GracefulShutdown()

    def run(self, note: str = "") -> dict[str, Any]:
        """Train to the end and return the summary of the run; print `note` first."""
        state, logger = self.state, self.logger
        if note:
            logger.print(note)
        if self.finished and state.evaluated_step == state.step:
            logger.print(f"the run in {self.run_dir.path} is finished: {state.epoch} epochs, {state.step} steps")
            return self.summary()
        self._print_batch_size()
        with self.shutdown, logger.open(state):
            while True:
                if self.evaluation_due:
                    self.evaluate()
                if self.finished:
                    break
                self.train_epoch()
                if not self.evaluation_due:
                    logger.print_epoch(state, self.progress)
            if self.progress < 1:
                logger.print(f"no better AP in {state.stale_evaluations} evaluations: the run ends")
        return self.summary()

    def train_epoch(self) -> None:
        """Train to the end of the epoch or of the run, then save."""
        state = self.state
        self.model.train()
        saved_at = state.seconds
        if state.epoch_step == 0:
            state.mosaic = self.config.data.mosaic_prob > 0 and self.progress < self.config.data.close_mosaic
        self.loader.sampler.set_epoch(state.epoch, start_step=state.epoch_step, mosaic=state.mosaic)
        batches = iter(self.loader)
        start = time.perf_counter()
        while state.epoch_step < self.steps_per_epoch:
            micro_batches, stats = self._next_batches(batches)
            metrics = self.train_step.step(micro_batches, state.step, self.progress, stats)
            self.logger.log_step(metrics, state, self.progress)
            state.epoch_step += 1
            state.step += 1
            state.images_seen += stats.images if stats else len(micro_batches[0][1])
            state.seconds += time.perf_counter() - start
            self.logger.show_progress(state, self.progress)
            self._stop_if_signaled()
            if self.progress >= 1:
                break
            if state.seconds - saved_at > _SAVE_SECONDS:
                self.save()
                saved_at = state.seconds
            start = time.perf_counter()
        self._finish_epoch()
        self.save()
        self._stop_if_signaled()

    def evaluate(self) -> None:
        """Evaluate the model on the validation set, and save it if it is the best one so far."""
        from ..weights.model_card import ModelCardData

        state, model = self.state, self.train_step.ema_or_model
        is_best = state.record_evaluation(self._compute_metrics(model))
        self.logger.log_evaluation(state)  # before it is saved: a run killed in between evaluates again
        if is_best:
            masks = {f"mask {name}": value for name, value in (state.metrics or {}).get("segm", {}).items()}
            named = {**(state.metrics or {}), **masks}
            metrics = {name: named[name] for name in named if name.startswith(("AP", "AR", "mask A"))}
            card = ModelCardData(self.data_name, metrics, self.config)
            self.context.on_rank_zero(lambda: self.run_dir.export(model, card))
            self.save(best=True)
        state_dict = self.state_dict()
        self.context.on_rank_zero(lambda: update_state(self.run_dir.checkpoints.last, state_dict))
        self.logger.print_epoch(state, self.progress)
        self._stop_if_signaled()

    @property
    def progress(self) -> float:
        """Part of the run that is done, 0..1, by epochs or minutes, whichever ends first."""
        train, state = self.config.train, self.state
        epochs = cast("int | None", train.epochs)  # `resolve_auto` replaced "auto"
        by_epochs = (state.epoch + state.epoch_step / self.steps_per_epoch) / epochs if epochs else 0.0
        by_minutes = state.seconds / (60 * train.minutes) if train.minutes else 0.0
        return min(1.0, max(by_epochs, by_minutes))

    @property
    def finished(self) -> bool:
        """Whether the run is complete or `patience` is exhausted."""
        patience = self.config.train.patience
        return self.progress >= 1 or (patience is not None and self.state.stale_evaluations >= patience)

    @property
    def evaluation_due(self) -> bool:
        """Whether an evaluation is missing: at the end of the run and of every `eval_every`-th epoch."""
        state, eval_every = self.state, cast("int", self.config.train.eval_every)
        epoch_end = state.step > 0 and state.epoch_step == 0 and state.epoch % eval_every == 0
        return (self.progress >= 1 or epoch_end) and state.evaluated_step != state.step

    def summary(self) -> dict[str, Any]:
        """Return what `train_model` returns."""
        state = self.state
        progress = {name: getattr(state, name) for name in ("epoch", "step", "images_seen", "seconds")}
        return {**(state.metrics or {}), "best_AP": state.best_ap, **progress}

    def _finish_epoch(self) -> None:
        if self.state.epoch_step == self.steps_per_epoch:
            self.state.epoch, self.state.epoch_step = self.state.epoch + 1, 0

    def save(self, best: bool = False) -> None:
        """Save the last (or the best) checkpoint, once the last step is known to be finite."""
        self.logger.log_step(self.train_step.flush_pending_metrics(), self.state, self.progress)
        state_dict, checkpoints = self.state_dict(), self.run_dir.checkpoints
        self.context.on_rank_zero(lambda: checkpoints.save(self.train_step.state_tensors(), state_dict, best))

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the tensors, ready for JSON. All processes must call it."""
        return {
            "train_state": asdict(self.state),
            "steps_per_epoch": self.steps_per_epoch,
            "progress": self.progress,
            "model": self.config.model.model_dump(mode="json"),
            "data": self.data_fingerprint,
            "scaler": self.train_step.scaler.state_dict(),
            "random": self.context.all_gather_object(random_state()),
            "total_batch_size": self.total_batch_size,
            "logger": self.logger.state_dict(),
        }

    def load_checkpoint(self, tensors: Mapping[str, dict[str, Tensor]], state_dict: Mapping[str, Any]) -> None:
        """Restore a checkpoint, which any number of processes may have saved."""
        with self.context.sync_errors():
            self.train_step.load_state_tensors(tensors)
        self.state = state = TrainState(**state_dict["train_state"])
        # With another batch size, the same part of the epoch is done.
        state.epoch_step = state.epoch_step * self.steps_per_epoch // state_dict["steps_per_epoch"]
        self._finish_epoch()
        if self.train_step.scaler.is_enabled() and state_dict["scaler"]:
            self.train_step.scaler.load_state_dict(state_dict["scaler"])
        self.logger.load_state_dict(state_dict["logger"])
        rank, states = self.context.rank, state_dict["random"]
        if rank == 0 or len(states) == self.context.world_size:
            restore_random_state(states[rank])
        else:
            torch.manual_seed(mix_seeds(self.config.train.seed, rank, state.step))

    def _next_batches(self, batches: Iterator[Batch]) -> tuple[list[Batch], BatchStats | None]:
        """Return this process's micro-batches of the next step; and their stats, if there are several in all."""
        micro_batches, error = [], None
        try:
            count = self.loader.sampler.micro_batches(self.state.epoch_step)
            micro_batches = [next(batches) for _ in range(count)]
        except UserError as failure:
            if self.context.world_size == 1:
                raise
            error = failure
        except RuntimeError:
            # Ctrl-C reaches the loader workers too, and PyTorch reports that they are gone.
            if self.shutdown.received is None or self.context.world_size > 1:
                raise
            self._stop_if_signaled()
        if self.context.world_size == 1 and len(micro_batches) == 1:
            return micro_batches, None
        counts = self.context.all_gather([*count_objects(micro_batches), error is not None])
        if any(failed for *_, failed in counts):
            self.context.raise_first(error)
        return micro_batches, BatchStats.combine(counts, self.context.rank)

    def _stop_if_signaled(self) -> None:
        """Save and stop if any process received a signal. All processes then have the clock of rank 0."""
        if self.context.world_size > 1:
            gathered = self.context.all_gather([self.state.seconds, self.shutdown.received or 0])
            self.state.seconds = gathered[0][0]
            self.shutdown.received = max(int(number) for _, number in gathered) or None
        if self.shutdown.received is None:
            return
        self.save()
        self._print_interrupted()
        self.context.exit_synced = True
        self.shutdown.raise_if_received()

    def _print_interrupted(self) -> None:
        last = self.run_dir.checkpoints.last
        self.logger.print(f"interrupted at step {self.state.step}; saved in {last}: resume with --resume")

    def _print_batch_size(self) -> None:
        train, world_size, count = self.config.train, self.context.world_size, self.loader.sampler.micro_batches(0)
        if world_size > 1 or count > 1 or train.total_batch_size or self.lr != train.lr:
            how = f"{world_size} processes × " if world_size > 1 else ""
            how += f"{count} × {train.batch_size} at most"
            self.logger.print(f"total batch size {self.total_batch_size} ({how}), learning rate {self._lr_note}")

    def _compute_metrics(self, model: Detector) -> dict[str, Any]:
        from ..evaluation.evaluator import evaluate_distributed
        from ..evaluation.gallery import add_to_gallery

        batch_size, workers = self.config.train.batch_size, self.config.data.workers
        tiling = check_tiling(self.config.data.tile, batch_size=batch_size)
        gallery = partial(add_to_gallery, self.run_dir.path, self.state.step, self.state.epoch)
        try:
            self.shutdown.immediate = True  # everything is saved: a signal need not wait for the evaluation
            self.shutdown.raise_if_received()
            return evaluate_distributed(model, self.val_set, batch_size, workers, self.context, gallery, tiling)
        except TrainingInterrupted:
            self._print_interrupted()
            raise
        finally:
            self.shutdown.immediate = False
