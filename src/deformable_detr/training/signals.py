"""The ways in which a training ends before its time."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any, Self

from ..utils.errors import UserError


class NonFiniteLoss(UserError):
    """The loss or its gradient is NaN or infinite; nothing was learnt from it and the last checkpoint is kept."""

    def __init__(self, step: int, losses: Mapping[str, float], image_ids: Sequence[int], what: str = "loss") -> None:
        self.step, self.losses, self.image_ids = step, dict(losses), list(image_ids)
        shown = [f"{name} {value:.4g}" for name, value in losses.items()
                 if name in ("loss", "loss_class", "loss_boxes", "loss_giou") or not math.isfinite(value)]  # fmt: skip
        super().__init__(
            f"the {what} is not finite at step {step}: {', '.join(shown)}; images {', '.join(map(str, image_ids))}; "
            "the last checkpoint is good: look at these images, lower train.lr or use train.precision fp32, and resume"
        )


class TrainingInterrupted(SystemExit):
    """Ctrl-C or SIGTERM: the last checkpoint is saved; ends the process with code 130 or 143, without a traceback."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)


class GracefulShutdown:
    """Within it, the first Ctrl-C or SIGTERM only sets `received`; the second one acts as it does elsewhere.

    `at_once`: set while nothing needs saving; a signal then raises `TrainingInterrupted` where it arrives.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.at_once = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._restore()

    def check(self) -> None:
        """Raises `TrainingInterrupted` if a signal was received."""
        if self.received is not None:
            raise TrainingInterrupted(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's process inherited this: its parent decides when it ends
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        self.received = number
        self._restore()
        if self.at_once:
            self.check()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
