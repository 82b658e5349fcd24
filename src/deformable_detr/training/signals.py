"""How a training ends early: signals and losses that are not finite."""

import math
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, Self

from ..utils.errors import UserError
from ..utils.process import STOP_SIGNALS


class NonFiniteLoss(UserError):
    """The loss or its gradient is NaN or infinite. The weights are not updated and the last checkpoint is kept."""

    def __init__(self, step: int, losses: Mapping[str, float], image_ids: Sequence[int], what: str = "loss") -> None:
        self.step, self.losses, self.image_ids = step, dict(losses), list(image_ids)
        main = ("loss", "loss_class", "loss_bbox", "loss_giou")
        shown = [f"{name} {value:.4g}" for name, value in losses.items() if name in main or not math.isfinite(value)]
        super().__init__(
            f"the {what} is not finite at step {step}: {', '.join(shown)}; images {', '.join(map(str, image_ids))}; "
            "check these images, lower train.lr or set train.precision=fp32, and resume from the last checkpoint"
        )


class TrainingInterrupted(SystemExit):
    """One of `STOP_SIGNALS` ended the training after saving. Exit code 128 + its number, without a traceback."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)


class GracefulShutdown:
    """Inside it, the first of `STOP_SIGNALS` only sets `received`; a second one acts as usual.

    Attributes:
        received: The signal, or None.
        immediate: Set while there is nothing to save; a signal then raises `TrainingInterrupted` at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.immediate = False
        self._pid = os.getpid()
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            for number in STOP_SIGNALS:
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                    self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore_handlers()

    def raise_if_received(self) -> None:
        """Raise `TrainingInterrupted` if a signal was received."""
        if self.received is not None:
            raise TrainingInterrupted(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a loader worker inherited this handler; its parent ends it
            if number != signal.SIGINT:
                os._exit(128 + number)
            return
        self.received = number
        self._restore_handlers()
        if self.immediate:
            self.raise_if_received()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
