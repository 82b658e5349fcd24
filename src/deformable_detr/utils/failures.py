"""What a machine can do to a training (full memory, full disk, killed processes), said in one line with the mend."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .errors import UserError

if TYPE_CHECKING:
    pass

_MENDS = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room in your quota",
    errno.EMFILE: "use fewer --workers, or raise the limit of open files (ulimit -n)",
    errno.ENFILE: "use fewer --workers, or raise the machine's limit of open files",
    errno.ENOMEM: "use fewer --workers or a smaller --batch-size",
}


@contextmanager
def machine_failures(
    batch_size: int, workers: int, smaller: str | None = None, then: Callable[[], str] = lambda: ""
) -> Iterator[None]:
    """As `machine_errors_as_user_errors`, for an evaluation.

    smaller: what to make so in full memory; then: gives the line's end.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        line = _line(error, smaller or f"use a smaller --batch-size (now {batch_size})", batch_size, workers)
        if line is None:
            raise
        raise UserError(line + then()) from error


def _line(error: Exception, smaller: str, batch_size: int, workers: int) -> str | None:
    """Cause and mend; None for an error that is none of the machine's. smaller: what to make so in full memory."""
    text = str(error)
    own = text.strip().splitlines()[-1].strip() if text.strip() else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text.lower():
        wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
        return f"the memory of the device is full{f' ({wanted[1]} more wanted)' if wanted else ''}: {smaller}"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"the memory of this machine is full: {smaller}, or use fewer --workers"
    if killed := re.search(r"DataLoader worker \(pid.*?\) (?:is|was) killed by signal: ([\w ]+)", text):
        return _killed(killed[1].strip(), batch_size, workers)
    if re.search(r"DataLoader worker \(pid.*?exited unexpectedly", text):
        return _killed("", batch_size, workers)
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or own}: {_MENDS.get(error.errno, 'mend that')}"
    if "DataLoader worker" in text and (number := re.search(r"\[Errno (\d+)\] ([^\n]*)", text)):
        return f"{number[2]}, in a process that loads images: {_MENDS.get(int(number[1]), 'mend that')}"
    return None


def _killed(how: str, batch_size: int, workers: int) -> str:
    if how == "Bus error":
        return (
            f"shared memory is full (/dev/shm), of which a process that loads images died: use fewer --workers "
            f"(now {workers}) or make it larger (docker run --shm-size)"
        )
    said = f" ({how})" if how else ""
    return (
        f"a process that loads images was killed{said}, as the system does where memory is full: use fewer --workers "
        f"(now {workers}; 0: none) or a smaller --batch-size (now {batch_size})"
    )
