"""What a training tells: metrics.jsonl, TensorBoard, and the progress on the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .checkpoint import write_text


class MetricsLog:
    """Writes each record as a line of `folder`/metrics.jsonl and its numbers to `folder`/tensorboard.

    step: of the checkpoint that the training goes on from; lines of later steps, whose work was lost, are removed.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        if path.exists():
            write_text(path, "".join(_lines_until(path, step)))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """One record of kind "train" or "evaluation", which has its "step"; flushed, so that others can follow it."""
        self._file.write(json.dumps({"kind": kind, **record}) + "\n")
        self._file.flush()
        for name, value in record.items():
            if isinstance(value, float):
                self._board.add_scalar(f"{kind}/{name}", value, record["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._file.close()
        self._board.close()


class Progress:
    """A bar on standard error where that is a terminal; elsewhere only the lines of `say`."""

    def __init__(self) -> None:
        from tqdm import tqdm

        layout = "{percentage:3.0f}%|{bar:20}| {elapsed}{postfix}"
        self._bar = tqdm(total=1.0, bar_format=layout, disable=None, dynamic_ncols=True, file=sys.stderr)

    def show(self, progress: float, facts: Mapping[str, str]) -> None:
        """Moves the bar to `progress`, 0..1, with the facts behind it."""
        if not self._bar.disable:
            self._bar.set_postfix_str(" ".join(f"{name} {value}" for name, value in facts.items()), refresh=False)
            self._bar.update(progress - self._bar.n)

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        self._bar.write(line, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._bar.close()


def duration(seconds: float) -> str:
    """Seconds as 1:05 or 2:03:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _lines_until(path: Path, step: int) -> list[str]:
    """The whole lines of steps up to `step`; the last line may be cut where a process was killed."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    return kept
