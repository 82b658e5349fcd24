"""What a training tells: metrics.jsonl, TensorBoard, and the progress on the terminal."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..utils.errors import UserError
from ..utils.files import replace_file

_log = logging.getLogger(__name__)


class MetricsLog:
    """Writes each record as a line of `folder`/metrics.jsonl and its numbers to `folder`/tensorboard.

    step, evaluated: of the checkpoint that the training goes on from and of its last evaluation; lines of later ones,
        whose work was lost, are removed.

    Raises OSError with the name of metrics.jsonl where either cannot be written.
    """

    def __init__(self, folder: Path, step: int = 0, evaluated: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._path = path = folder / "metrics.jsonl"
        try:
            if path.exists():
                replace_file(path, "".join(_lines_until(path, step, step if evaluated is None else evaluated)))
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        except OSError as error:
            raise self._named(error) from None
        self._hook, threading.excepthook = threading.excepthook, self._quiet

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """One record of kind "train" or "evaluation", which has its "step"; flushed, so that others can follow it.

        After an evaluation the run's training.html is written anew.
        """
        try:
            line = (json.dumps({"kind": kind, **record}) + "\n").encode()
            if self._file.write(line) != len(line):  # what is left of a disk that is about to be full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
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
        except (UserError, OSError) as error:  # the run goes on without it
            _log.warning("the page of curves was not written: %s", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        try:
            self._file.close()
            self._board.close()
        except OSError as failure:
            if error is None:  # else there is more to say than this
                raise self._named(failure) from None
        finally:
            threading.excepthook = self._hook

    def _quiet(self, arguments: threading.ExceptHookArgs, /) -> None:
        """TensorBoard writes in a thread, whose error comes to light at the next record: no traceback for that."""
        if not issubclass(arguments.exc_type, OSError):
            self._hook(arguments)

    def _named(self, error: OSError) -> OSError:
        """The error with the name of the file that people know of, in the place of what TensorBoard calls its own."""
        return OSError(error.errno or errno.EIO, error.strerror or str(error), str(self._path))


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


def _lines_until(path: Path, step: int, evaluated: int) -> list[str]:
    """The whole lines of steps up to `step`, of evaluations up to `evaluated`; the last may be cut by a kill."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= (evaluated if record.get("kind") == "evaluation" else step):
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    return kept
