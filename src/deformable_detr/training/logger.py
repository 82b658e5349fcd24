"""Training output: metrics.jsonl, TensorBoard (optional), the progress bar and lines on standard error."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..config.schema import TrainConfig
from ..utils.errors import UserError
from ..utils.files import replace_file
from ..utils.packages import need
from .step import StepMetrics

_log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Progress of a run; saved with every checkpoint.

    epoch: Finished epochs. epoch_step: Steps taken in the current epoch. step: Optimizer steps. seconds: Of training,
    without evaluation and saving. best_ap: Highest AP so far. stale_evaluations: Evaluations since it improved.
    evaluated_step: Step of the last evaluation. metrics: Its result. mosaic: Whether the current epoch uses mosaics.
    """

    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    best_ap: float | None = None
    stale_evaluations: int = 0
    evaluated_step: int = -1
    metrics: dict[str, Any] | None = None
    mosaic: bool = False

    def record_evaluation(self, metrics: dict[str, Any]) -> bool:
        """Store the result of an evaluation and return whether this model is the best one so far.

        Of equal models the later one is better. `stale_evaluations` counts only after the first AP above 0.
        """
        ap = metrics["AP"]
        improved = not self.best_ap or (ap is not None and ap > self.best_ap)
        is_best = improved or ap == self.best_ap
        self.metrics, self.evaluated_step = metrics, self.step
        self.stale_evaluations = 0 if improved else self.stale_evaluations + 1
        if is_best:
            self.best_ap = ap
        return is_best


class TrainingLogger:
    """Log steps and evaluations. Disabled (on all ranks but 0) it only keeps the state of the next line.

    Enter it to show the progress bar; call `open` before the first step.
    """

    def __init__(self, config: TrainConfig, folder: Path, enabled: bool = True) -> None:
        self.config, self.folder, self.enabled = config, folder, enabled
        self._stack = ExitStack()
        self._bar: Any = None
        self._file: MetricsFile | None = None
        self._history: defaultdict[str, list[float]] = defaultdict(list)  # step metrics since the last line
        self._logged = (0, 0.0)  # images and seconds at that line
        self._smoothed_loss = math.nan
        if config.tensorboard and enabled:
            need("tensorboard", "tensorboard")

    def __enter__(self) -> Self:
        from tqdm import tqdm

        if self.enabled:
            layout = "{percentage:3.0f}%|{bar:20}| {elapsed}{postfix}"
            bar = tqdm(total=1.0, bar_format=layout, disable=None, dynamic_ncols=True, file=sys.stderr)
            self._bar = self._stack.enter_context(bar)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        return self._stack.__exit__(kind, error, trace)

    def open(self, state: TrainState) -> None:
        """Open metrics.jsonl, without the lines of a resumed run that came after its checkpoint."""
        if self.enabled:
            file = MetricsFile(self.folder, state.step, state.evaluated_step, self.config.tensorboard)
            self._file = self._stack.enter_context(file)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next line of metrics.jsonl depends on."""
        return {"history": dict(self._history), "logged": self._logged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._history.update(state["history"])
        self._logged = tuple(state["logged"])

    def log_step(self, metrics: StepMetrics | None, state: TrainState, progress: float) -> None:
        """Collect the metrics of a step; every `log_every` steps, write a line with their means."""
        if metrics is None:
            return
        loss = metrics.values["loss"]
        self._smoothed_loss = loss if math.isnan(self._smoothed_loss) else 0.95 * self._smoothed_loss + 0.05 * loss
        for name, value in metrics.values.items():
            if math.isfinite(value):  # the gradient may overflow in fp16
                self._history[name].append(value)
        if metrics.step % self.config.log_every:
            return
        self._write("train", {
            "step": metrics.step, "epoch": state.epoch, "progress": round(progress, 6),
            "images_seen": state.images_seen, "seconds": round(state.seconds, 3),
            "images_per_second": round(self._images_per_second(state), 3), "lr": metrics.lr,
            **{name: sum(values) / len(values) for name, values in self._history.items()},
        })  # fmt: skip
        self._logged = (state.images_seen, state.seconds)
        self._history.clear()

    def log_evaluation(self, state: TrainState) -> None:
        """Write the line of an evaluation."""
        self._write("evaluation", {
            "step": state.step, "epoch": state.epoch, "images_seen": state.images_seen,
            "seconds": round(state.seconds, 3), **(state.metrics or {}), "best_AP": state.best_ap,
        })  # fmt: skip

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(kind, record)

    def _images_per_second(self, state: TrainState) -> float:
        return (state.images_seen - self._logged[0]) / max(state.seconds - self._logged[1], 1e-9)

    def print(self, line: str) -> None:
        """Print a line above the progress bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)

    def show_progress(self, state: TrainState, progress: float) -> None:
        """Update the progress bar, which is shown only on a terminal."""
        if self._bar is None or self._bar.disable:
            return
        self._bar.set_postfix_str(
            f"epoch {self._epoch(state.epoch + 1)} loss {self._smoothed_loss:.3f} AP {_figure(state.best_ap)} "
            f"images/s {self._images_per_second(state):.1f} left {_remaining(state, progress)}",
            refresh=False,
        )
        self._bar.update(progress - self._bar.n)

    def print_epoch(self, state: TrainState, progress: float) -> None:
        """Print the summary of an epoch, with the result of its evaluation if there was one."""
        line = f"epoch {self._epoch(state.epoch)}: step {state.step}, loss {self._smoothed_loss:.3f}"
        if state.evaluated_step == state.step and state.metrics:
            ap, ap50 = _figure(state.metrics["AP"]), _figure(state.metrics["AP50"])
            line += f", AP {ap}, AP50 {ap50}, best AP {_figure(state.best_ap)}"
        speed = state.images_seen / max(state.seconds, 1e-9)
        trained, left = format_duration(state.seconds), _remaining(state, progress)
        self.print(f"{line}, {speed:.1f} images/s, {trained} trained, {left} left")

    def _epoch(self, epoch: int) -> str:
        return f"{epoch}/{self.config.epochs}" if self.config.epochs else str(epoch)


class MetricsFile:
    """metrics.jsonl with one record per line, and with `tensorboard` its numbers as event files.

    Opening it removes the lines after `step` (evaluations: after `evaluated_step`), the lost work of a resumed run.
    A failed write raises OSError with the name of metrics.jsonl.
    """

    def __init__(
        self, folder: Path, step: int = 0, evaluated_step: int | None = None, tensorboard: bool = False
    ) -> None:
        self._folder, self._path, self._board = folder, folder / "metrics.jsonl", None
        try:
            if self._path.exists():
                evaluated_step = step if evaluated_step is None else evaluated_step
                replace_file(self._path, "".join(_lines_until(self._path, step, evaluated_step)))
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        except OSError as error:
            raise self._named(error) from None

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """Write a record of kind "train" or "evaluation"; after an evaluation, rewrite training.html."""
        try:
            line = (json.dumps({"kind": kind, **record}) + "\n").encode()
            if self._file.write(line) != len(line):  # the disk is almost full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._board is not None:
                for name, value in record.items():
                    if isinstance(value, float):
                        self._board.add_scalar(f"{kind}/{name}", value, record["step"])
        except OSError as error:
            raise self._named(error) from None
        if kind == "evaluation":
            self._write_page()

    def _write_page(self) -> None:
        from ..evaluation.training_page import write_training_page

        try:
            write_training_page(self._folder)
        except (UserError, OSError) as error:
            _log.warning("training.html was not written: %s", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        try:
            self._file.close()
            if self._board is not None:
                self._board.close()
        except OSError as failure:
            if error is None:
                raise self._named(failure) from None

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno or errno.EIO, error.strerror or str(error), str(self._path))


def format_duration(seconds: float) -> str:
    """Format seconds as 1:05 or 2:03:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _remaining(state: TrainState, progress: float) -> str:
    return format_duration(state.seconds * (1 - progress) / progress) if progress else "?"


def _figure(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"


def _lines_until(path: Path, step: int, evaluated_step: int) -> list[str]:
    """Return the complete lines up to `step`, evaluations up to `evaluated_step`; a kill may have cut the last."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= (evaluated_step if record.get("kind") == "evaluation" else step):
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    return kept
