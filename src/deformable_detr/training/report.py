"""What a run says while it trains: metrics.jsonl, TensorBoard and the terminal, all by the first process."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..config.schema import TrainConfig
from .log import MetricsLog, Progress, duration
from .step import StepFigures


@dataclass
class TrainState:
    """How far a run is.

    epoch: epochs done; batch: steps done of the epoch that runs; step: optimizer steps; seconds: of training;
    best: highest AP so far; stale: evaluations since; evaluated_step: step of the last evaluation; metrics: its
    figures; mosaic: whether the running epoch has mosaics.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    best: float | None = None
    evaluated_step: int = -1
    metrics: dict[str, Any] | None = None
    stale: int = 0
    mosaic: bool = False


class Report:
    """Writes and shows how far a run is. In all processes but the first it does nothing."""

    def __init__(self, config: TrainConfig, folder: Path, speaks: bool = True) -> None:
        self.config, self.folder, self.speaks = config, folder, speaks
        self._open = ExitStack()
        self._bar: Progress | None = None
        self._log: MetricsLog | None = None
        self._history: defaultdict[str, list[float]] = defaultdict(list)  # since the last line of the log
        self._logged = (0, 0.0)  # images and seconds at that line
        self._loss = math.nan  # smoothed, for the eye

    def __enter__(self) -> Self:
        if self.speaks:
            self._bar = self._open.enter_context(Progress())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        return self._open.__exit__(kind, error, trace)

    def begin(self, done: TrainState) -> None:
        """Goes on with the files of the run from where it is."""
        if self.speaks:
            self._log = self._open.enter_context(MetricsLog(self.folder, done.step, done.evaluated_step))

    def state(self) -> dict[str, Any]:
        """What the next line of the log will be made of."""
        return {"history": dict(self._history), "logged": self._logged}

    def resume(self, done: TrainState, state: Mapping[str, Any] | None = None) -> None:
        """Figures count from here, or from where `state` says."""
        self._logged = (done.images_seen, done.seconds)
        if state is not None:
            self._history.update(state["history"])
            self._logged = tuple(state["logged"])

    def account(self, figures: StepFigures | None, done: TrainState, progress: float) -> None:
        """Adds a step's figures to the log; a line every `log_every` steps has the means since the line before."""
        if figures is None:
            return
        loss = figures.values["loss"]
        self._loss = loss if math.isnan(self._loss) else 0.95 * self._loss + 0.05 * loss
        for name, value in figures.values.items():
            if math.isfinite(value):  # a gradient may overflow in fp16
                self._history[name].append(value)
        if figures.step % self.config.log_every:
            return
        images, seconds = done.images_seen - self._logged[0], done.seconds - self._logged[1]
        facts = {
            "step": figures.step, "epoch": done.epoch, "progress": round(progress, 6),
            "images_seen": done.images_seen, "seconds": round(done.seconds, 3),
            "images_per_second": round(images / max(seconds, 1e-9), 3), "lr": figures.lr,
        }  # fmt: skip
        self._write("train", facts | {name: sum(values) / len(values) for name, values in self._history.items()})
        self._logged = (done.images_seen, done.seconds)
        self._history.clear()

    def evaluated(self, done: TrainState) -> None:
        """The line of an evaluation."""
        facts = {"step": done.step, "epoch": done.epoch, "images_seen": done.images_seen}
        figures = {"seconds": round(done.seconds, 3), **(done.metrics or {}), "best_AP": done.best}
        self._write("evaluation", facts | figures)

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(kind, record)

    # --- what the terminal shows --------------------------------------------------------------------------------

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.say(line)

    def show(self, done: TrainState, progress: float) -> None:
        """The bar after a step."""
        if self._bar is None:
            return
        speed = (done.images_seen - self._logged[0]) / max(done.seconds - self._logged[1], 1e-9)
        total = f"/{self.config.epochs}" if self.config.epochs else ""
        facts = {"epoch": f"{done.epoch + 1}{total}", "loss": f"{self._loss:.3f}", "AP": _figure(done.best)}
        self._bar.show(progress, {**facts, "images/s": f"{speed:.1f}", "left": _left(done, progress)})

    def say_epoch(self, done: TrainState, progress: float) -> None:
        """The line of an epoch, with the figures of its evaluation where there was one."""
        total = f"/{self.config.epochs}" if self.config.epochs else ""
        line = f"epoch {done.epoch}{total}: step {done.step}, loss {self._loss:.3f}"
        if done.evaluated_step == done.step and done.metrics:
            metrics = done.metrics
            line += f", AP {_figure(metrics['AP'])}, AP50 {_figure(metrics['AP50'])}, best AP {_figure(done.best)}"
        speed = done.images_seen / max(done.seconds, 1e-9)
        trained = duration(done.seconds)
        self.say(f"{line}, {speed:.1f} images/s, {trained} trained, {_left(done, progress)} left")


def _left(done: TrainState, progress: float) -> str:
    return duration(done.seconds * (1 - progress) / progress) if progress else "?"


def _figure(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"
