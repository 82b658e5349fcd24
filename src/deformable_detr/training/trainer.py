"""Training: steps, epochs, evaluation, checkpoints, and how a run begins, goes on and ends."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from ..config.schema import Config
from ..distributed.context import DistributedContext
from ..distributed.launch import restarted
from ..evaluation.distributed import evaluate_distributed
from ..utils.errors import UserError
from .checkpoint import random_state, restore_random_state, update_state
from .optimizer import scaled_lr, total_batch_size
from .recipe import for_size
from .report import Report, TrainState
from .run_dir import RunDir, fingerprint
from .setup import build, held, machine_errors_as_user_errors, same_batch, seed_all, with_classes
from .signals import GracefulShutdown, TrainingInterrupted
from .step import TrainStep
from .totals import Batch, BatchStats, combined, own_figures

if TYPE_CHECKING:
    from ..data.dataset import CocoDataset
    from ..detector import DeformableDETR

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
    folder = RunDir(out)
    with DistributedContext(config.train.device) as world:
        resume = world.on_rank_zero(lambda: resume or (restarted() and folder.begun))
        with held(folder, resume, world), machine_errors_as_user_errors(folder, config):
            return _train_in(folder, data, config, resume, world)


def _train_in(
    folder: RunDir, data: str | os.PathLike[str], config: Config, resume: bool, world: DistributedContext
) -> dict[str, Any]:
    from ..data.dataset import open_dataset, refuse_same_file
    from ..data.transforms import EvalTransform, TrainTransform
    from ..data.validate import check_for_training

    size, multiple = (config.model.image_size, config.model.long_side), config.model.size_divisor
    if not resume:  # a run that goes on had its set checked; that it is the same one is seen below
        for line in world.on_rank_zero(lambda: list(check_for_training(data, config.data, *size))):
            log.warning(line)
    split = config.data.train_split, config.data.val_split
    with world.sync_errors():
        train_set = open_dataset(
            data, split[0], config.data, transform=TrainTransform.from_config(config.data, *size, multiple)
        )
        if not len(train_set):
            raise UserError(f"the training set at {data} has no images")
        known = train_set.categories
        validation = open_dataset(
            data, split[1], config.data, categories=known, transform=EvalTransform(*size, size_divisor=multiple)
        )
        refuse_same_file(train_set, validation, data)
        config, note = for_size(with_classes(config, train_set), len(train_set))
    restored = world.on_rank_zero(lambda: folder.restore(config, fingerprint(train_set)) if resume else None)
    if restored is not None:
        config = same_batch(config, restored[1], world)

    seed_all(config.train.seed)
    anew = resume and restored is None
    model = world.local_rank_zero_first(lambda: build(config, restored is not None, world.is_rank_zero)).to(
        world.device
    )
    trainer = Trainer(config, model, train_set, validation, folder, Path(data).resolve().name, world)
    if restored is not None:
        trainer.restore(*restored)
        restored = None  # its files stay open, and on the disk, as long as their tensors are there
    elif not world.is_rank_zero:
        seed_all(config.train.seed, world.rank)  # for dropout; what all must draw alike has seeds of its own
    world.on_rank_zero(lambda: folder.write_config(trainer.config))
    return trainer.run("no checkpoint yet in this run: it starts anew" if anew else note)


class Trainer:
    """One run: a model, its optimizer, its data, and the folder where it is kept."""

    def __init__(
        self,
        config: Config,
        model: DeformableDETR,
        train_set: CocoDataset,
        validation: CocoDataset,
        folder: RunDir,
        data_name: str | None = None,
        world: DistributedContext | None = None,
    ) -> None:
        from ..data.dataloader import LoaderOptions, build_dataloader
        from ..data.mosaic import MosaicDataset

        self.world = world or DistributedContext(str(model.pixel_mean.device), size=1)
        self.data_name = data_name  # for the model card
        self.model, self.validation, self.folder = model, validation, folder
        self.effective = total_batch_size(config.train, self.world.size)
        self.lr, self._lr_note = scaled_lr(config.train, self.effective)
        if self.world.size > 1 and config.train.total_batch_size is None:  # as it is now it stays, wherever it goes on
            batch = {
                "total_batch_size": self.effective,
                "base_batch_size": config.train.base_batch_size or config.train.batch_size,
            }
            config = config.updated({"train": batch})
        self.config, train = config, config.train
        # `for_size` left no "auto".
        self.epochs, self.eval_every = cast("int | None", train.epochs), cast("int", train.eval_every)
        self.data_fingerprint = fingerprint(train_set)
        shown = MosaicDataset(train_set, config.data.mosaic_prob) if config.data.mosaic_prob else train_set
        options = LoaderOptions(
            train.batch_size, config.data.workers, shuffle=True, seed=train.seed, total_batch_size=self.effective,
            rank=self.world.rank, world_size=self.world.size, aspect_ratio_grouping=config.data.aspect_ratio_grouping,
        )  # fmt: skip
        self.loader = build_dataloader(shown, options)
        self.batches = self.loader.sampler.num_steps
        with self.world.sync_errors():
            self.stepper = TrainStep(model, train.replace(lr=self.lr), self.world)
        self.counters = TrainState()
        self.stop = GracefulShutdown()
        self.report = Report(train, folder.path, self.world.is_rank_zero)

    # --- how far ------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """0..1, part of the run that is done, by epochs or minutes, whichever ends first."""
        train, done = self.config.train, self.counters
        epochs = (done.epoch + done.batch / self.batches) / self.epochs if self.epochs else 0.0
        minutes = done.seconds / (60 * train.minutes) if train.minutes else 0.0
        return min(1.0, max(epochs, minutes))

    @property
    def ended(self) -> bool:
        """Whether all of it is done, or it stopped getting better."""
        patience = self.config.train.patience
        return self.progress >= 1 or (patience is not None and self.counters.stale >= patience)

    def run(self, note: str | None = None) -> dict[str, Any]:
        """Trains to the end and returns the figures; says `note` first."""
        done = self.counters
        with self.report as report:
            if note:
                report.say(note)
            if self.ended and done.evaluated_step == done.step:
                report.say(f"the run in {self.folder.path} is finished: {done.epoch} epochs, {done.step} steps")
                return self._summary()
            self._say_batch()
            with self.stop:
                report.begin(done)
                while True:
                    if self._evaluation_due():
                        self._evaluate()
                    if self.ended:
                        break
                    self._epoch()
                    if not self._evaluation_due():
                        report.say_epoch(done, self.progress)
                if self.progress < 1:
                    report.say(f"no better AP in {done.stale} evaluations: the run ends")
        return self._summary()

    def _say_batch(self) -> None:
        train, passes = self.config.train, self.loader.sampler.micro_batches(0)
        if self.world.size > 1 or passes > 1 or train.total_batch_size:
            how = f"{self.world.size} processes × " if self.world.size > 1 else ""
            how += f"{passes} passes of up to {train.batch_size}"
            self.report.say(f"{self.effective} images a step ({how}), learning rate {self._lr_note}")

    def _evaluation_due(self) -> bool:
        """At the end of the run and of every `eval_every`-th epoch; also for a run that was killed before it."""
        done = self.counters
        whole = done.step > 0 and done.batch == 0 and done.epoch % self.eval_every == 0
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
        if done.batch == 0:
            done.mosaic = self.config.data.mosaic_prob > 0 and self.progress < self.config.data.close_mosaic
        self.loader.sampler.set_epoch(done.epoch, start_step=done.batch, mosaic=done.mosaic)
        batches = iter(self.loader)
        mark = time.perf_counter()
        while done.batch < self.batches:
            passes, totals = self._next(batches)
            self.report.account(self.stepper.step(passes, done.step, self.progress, totals), done, self.progress)
            done.batch += 1
            done.step += 1
            done.images_seen += totals.images if totals else len(passes[0][1])
            done.seconds += time.perf_counter() - mark
            self._agree()
            self.report.show(done, self.progress)
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
        self._agree()
        if self.stop.received is not None:
            self._interrupt()

    def _next(self, batches: Iterator[Batch]) -> tuple[list[Batch], BatchStats | None]:
        """This process's passes of the next step, and what all of them together hold, if there are several."""
        passes, failure = [], None
        try:
            passes = [next(batches) for _ in range(self.loader.sampler.micro_batches(self.counters.batch))]
        except UserError as error:
            if self.world.size == 1:
                raise
            failure = error
        except RuntimeError:
            # Ctrl-C reaches the loader's processes too, and PyTorch complains that they are gone.
            if self.stop.received is None or self.world.size > 1:
                raise
            self._interrupt()
        if self.world.size == 1 and len(passes) == 1:
            return passes, None
        told = self.world.gather([*own_figures(passes), failure is not None])
        if any(failed for *_, failed in told):
            self.world.raise_on_all_ranks(failure)
        return passes, combined(told, self.world.rank)

    def _agree(self) -> None:
        """The first process's clock counts, and a signal that one process has got is everybody's."""
        if self.world.size == 1:
            return
        told = self.world.gather([self.counters.seconds, self.stop.received or 0])
        self.counters.seconds = told[0][0]
        signals = [int(number) for _, number in told if number]
        if signals:
            self.stop.received = max(signals)

    # --- between the steps --------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        from ..evaluation.evaluator import evaluate_dataset
        from ..evaluation.gallery import Gallery

        train, done = self.config.train, self.counters
        learned, workers = self.stepper.learned, self.config.data.workers
        try:
            self.stop.at_once = True  # all is saved: a signal need not wait until the evaluation is over
            self.stop.check()
            keep = Gallery(self.folder.path, done.step, done.epoch)
            if self.world.size > 1:
                metrics = evaluate_distributed(learned, self.validation, train.batch_size, workers, self.world, keep)
            else:
                metrics = evaluate_dataset(learned, self.validation, train.batch_size, workers, None, False, keep)
        except TrainingInterrupted:
            self._say_interrupted()
            raise
        finally:
            self.stop.at_once = False
        figure = metrics["AP"]
        # Of equals the later: while nothing is found, the model has seen more; and patience begins with a first find.
        gained = not done.best or (figure is not None and figure > done.best)
        better = gained or figure == done.best
        done.metrics, done.evaluated_step, done.stale = metrics, done.step, 0 if gained else done.stale + 1
        if better:
            done.best = figure
        self.report.evaluated(done)  # before it is saved: a run that is killed in between evaluates again
        if better:
            from ..weights.model_card import ModelCardData

            figures = {name: value for name, value in metrics.items() if name.startswith(("AP", "AR"))}
            facts = ModelCardData(self.data_name, figures, self.config)
            self.world.on_rank_zero(lambda: self.folder.export(learned, facts))
            self.save(best=True)
        state = self._state()
        self.world.on_rank_zero(lambda: update_state(self.folder.last, state))
        self.report.say_epoch(done, self.progress)
        self._agree()
        if self.stop.received is not None:
            self._interrupt()

    def save(self, best: bool = False) -> None:
        """Makes the present state the last (or the best) checkpoint, once the last step proved good."""
        self.report.account(self.stepper.settle(), self.counters, self.progress)
        state = self._state()
        self.world.on_rank_zero(lambda: self.folder.save(self.stepper.tensors(), state, best))

    def _state(self) -> dict[str, Any]:
        """All but the tensors; every process must ask."""
        state = {
            "counters": asdict(self.counters),
            "batches": self.batches,
            "progress": self.progress,
            "model": self.config.model.model_dump(mode="json"),
            "data": self.data_fingerprint,
            "scaler": self.stepper.scaler.state_dict(),
            "random": random_state(),
            "total_batch_size": self.effective,
            "report": self.report.state(),
        }
        if self.world.size > 1:
            state["random_of_others"] = self.world.all_gather_object(random_state())[1:]
        return state

    def restore(self, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Goes back to where a checkpoint was saved, by any number of processes."""
        with self.world.sync_errors():
            self.stepper.load(tensors)
        self.counters = done = TrainState(**state["counters"])
        # With another batch size, as much of the epoch is done as before.
        done.batch = done.batch * self.batches // state["batches"]
        if done.batch == self.batches:
            done.epoch, done.batch = done.epoch + 1, 0
        if self.stepper.scaler.is_enabled() and state["scaler"]:
            self.stepper.scaler.load_state_dict(state["scaler"])
        self.report.resume(done, state.get("report"))
        others = state.get("random_of_others", [])
        if self.world.is_rank_zero:
            restore_random_state(state["random"])
        elif len(others) == self.world.size - 1:
            restore_random_state(others[self.world.rank - 1])
        else:
            seed_all(self.config.train.seed, self.world.rank, done.step)

    def _interrupt(self) -> None:
        self.save()
        self._say_interrupted()
        self.world.agreed = True
        self.stop.check()

    def _say_interrupted(self) -> None:
        step, place = self.counters.step, self.folder.last
        self.report.say(f"interrupted at step {step}; saved in {place}: go on with --resume")
