"""Training output: metrics.jsonl, TensorBoard (optional), the progress bar and lines on standard error."""

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.schema import TrainConfig
from ..utils.errors import UserError
from ..utils.files import replace_file
from ..utils.packages import need
from ..utils.progress import ProgressBar, progress_bar, write_line
from .step import StepMetrics

_log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Progress of a run; saved with every checkpoint.

    epoch: Finished epochs. epoch_step: Steps taken in the current epoch. step: Optimizer steps. seconds: Of training,
    without evaluation and saving. best_ap: Highest `selection_ap` so far. stale_evaluations: Evaluations since then.
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
        """Store the result of an evaluation and return whether this model is the best one so far by `selection_ap`.

        Of equal models the later one is better. `stale_evaluations` counts only after the first AP above 0.
        """
        ap = selection_ap(metrics)
        improved = not self.best_ap or (ap is not None and ap > self.best_ap)
        is_best = improved or ap == self.best_ap
        self.metrics, self.evaluated_step = metrics, self.step
        self.stale_evaluations = 0 if improved else self.stale_evaluations + 1
        if is_best:
            self.best_ap = ap
        return is_best


def selection_ap(metrics: Mapping[str, Any]) -> float | None:
    """Return the AP that selects the best model: of its masks if they were evaluated, else of its boxes."""
    return metrics.get("segm", metrics)["AP"]


class TrainingLogger:
    """Log steps and evaluations inside `open`. Disabled (on ranks over 0), it only keeps the state of the next line."""

    def __init__(self, config: TrainConfig, folder: Path, enabled: bool = True) -> None:
        self.config, self.folder, self.enabled = config, folder, enabled
        self.path = folder / "metrics.jsonl"
        self._bar: ProgressBar | None = None
        self._board: Any = None
        self._history: defaultdict[str, list[float]] = defaultdict(list)  # step metrics since the last line
        self._logged = (0, 0.0)  # images and seconds at that line
        self._smoothed_loss: float | None = None  # of the printed lines
        if config.tensorboard and enabled:
            need("tensorboard", "tensorboard")

    @contextmanager
    def open(self, state: TrainState) -> Iterator[None]:
        """Show the progress bar; first remove the lines of metrics.jsonl from after the checkpoint of a resumed run."""
        with ExitStack() as stack:
            if self.enabled:
                if self.path.exists():
                    replace_file(self.path, "".join(_lines_until(self.path, state)))
                if self.config.tensorboard:
                    from torch.utils.tensorboard import SummaryWriter

                    first_step = state.step + 1 if state.step else None
                    writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first_step)
                    self._board = stack.enter_context(writer)
                layout = "{percentage:3.0f}%|{bar:20}| {elapsed}{postfix}"
                line = "train: {percentage:.0f}%, {elapsed}{postfix}"
                bar = progress_bar(1.0, "", "train", bar_format=layout, line_format=line)
                self._bar = stack.enter_context(bar)
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return what the next lines depend on."""
        return {"history": dict(self._history), "logged": self._logged, "smoothed_loss": self._smoothed_loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._history.update(state["history"])
        self._logged = tuple(state["logged"])
        self._smoothed_loss = state.get("smoothed_loss")

    def log_step(self, metrics: StepMetrics | None, state: TrainState, progress: float) -> None:
        """Collect the metrics of a step; every `log_every` steps, write a line with their means."""
        if metrics is None:
            return
        values = {name: value for name, value in metrics.values.items() if math.isfinite(value)}  # fp16 may overflow
        if (loss := values.get("loss")) is not None:
            self._smoothed_loss = loss if self._smoothed_loss is None else 0.95 * self._smoothed_loss + 0.05 * loss
        for name, value in values.items():
            self._history[name].append(value)
        if metrics.step % self.config.log_every:
            return
        self.write("train", {
            "step": metrics.step, "epoch": state.epoch, "progress": round(progress, 6),
            "images_seen": state.images_seen, "seconds": round(state.seconds, 3),
            "images_per_second": round(self._images_per_second(state), 3), "lr": metrics.lr,
            **{name: sum(values) / len(values) for name, values in self._history.items()},
        })  # fmt: skip
        self._logged = (state.images_seen, state.seconds)
        self._history.clear()

    def log_evaluation(self, state: TrainState) -> None:
        """Write the line of an evaluation."""
        self.write("evaluation", {
            "step": state.step, "epoch": state.epoch, "images_seen": state.images_seen,
            "seconds": round(state.seconds, 3), **(state.metrics or {}), "best_AP": state.best_ap,
        })  # fmt: skip

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """Write a record of kind "train" or "evaluation"; after an evaluation, rewrite training.html."""
        if not self.enabled:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, **record}) + "\n")
        except OSError as error:  # a failed write does not name the file
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        if self._board is not None:
            masks = {f"mask_{name}": value for name, value in record.get("segm", {}).items()}
            for name, value in {**record, **masks}.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{kind}/{name}", value, record["step"])
        if kind == "evaluation":
            from ..evaluation.training_page import write_training_page

            try:
                write_training_page(self.folder)
            except (UserError, OSError) as error:
                _log.warning("training.html was not written: %s", error)

    def _images_per_second(self, state: TrainState) -> float:
        return (state.images_seen - self._logged[0]) / max(state.seconds - self._logged[1], 1e-9)

    def print(self, line: str) -> None:
        """Print a line above the progress bar."""
        if self.enabled:
            write_line(line)

    def show_progress(self, state: TrainState, progress: float) -> None:
        """Update the progress bar."""
        if self._bar is None or self._bar.disable:
            return
        name = "mask AP" if "segm" in (state.metrics or {}) else "AP"
        self._bar.set_postfix_str(
            f"epoch {self._epoch(state.epoch + 1)} loss {_figure(self._smoothed_loss)} {name} {_figure(state.best_ap)} "
            f"images/s {self._images_per_second(state):.1f} left {_remaining(state, progress)}",
            refresh=False,
        )
        self._bar.update(progress - self._bar.n)

    def print_epoch(self, state: TrainState, progress: float) -> None:
        """Print the summary of an epoch, with the result of its evaluation if there was one."""
        line = f"epoch {self._epoch(state.epoch)}: step {state.step}, loss {_figure(self._smoothed_loss)}"
        if state.evaluated_step == state.step and state.metrics:
            ap, ap50 = _figure(state.metrics["AP"]), _figure(state.metrics["AP50"])
            line += f", AP {ap}, AP50 {ap50}"
            if "segm" in state.metrics:
                line += f", mask AP {_figure(state.metrics['segm']['AP'])}, best mask AP {_figure(state.best_ap)}"
            else:
                line += f", best AP {_figure(state.best_ap)}"
        speed = state.images_seen / max(state.seconds, 1e-9)
        trained, left = ProgressBar.format_interval(state.seconds), _remaining(state, progress)
        self.print(f"{line}, {speed:.1f} images/s, {trained} trained, {left} left")

    def _epoch(self, epoch: int) -> str:
        return f"{epoch}/{self.config.epochs}" if self.config.epochs else str(epoch)


def _remaining(state: TrainState, progress: float) -> str:
    return ProgressBar.format_interval(state.seconds * (1 - progress) / progress) if progress else "?"


def _figure(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"


def _lines_until(path: Path, state: TrainState) -> list[str]:
    """Return the complete lines up to the checkpoint of this state; a kill may have cut the last line."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= (state.evaluated_step if record["kind"] == "evaluation" else state.step):
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    return kept
