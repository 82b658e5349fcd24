"""What a machine can do to a training (full memory, full disk, killed processes), said in one line with the mend."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..config import Config
from ..errors import UserError
from .checkpoint import generations

if TYPE_CHECKING:
    from .run_folder import RunFolder

_MENDS = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room in your quota",
    errno.EMFILE: "use fewer --workers, or raise the limit of open files (ulimit -n)",
    errno.ENFILE: "use fewer --workers, or raise the machine's limit of open files",
    errno.ENOMEM: "use fewer --workers or a smaller --batch-size",
}


@contextmanager
def said_plainly(folder: RunFolder, config: Config) -> Iterator[None]:
    """Turns what the machine does to the training within into a `UserError`: the cause, the mend, what is saved.

    That is: memory of the device or of the machine full; a loader's process killed; files that cannot be written or
    read. Other errors, which are faults of the program, pass as they are.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        line = _line(error, config)
        if line is None:
            raise
        raise UserError(f"{line}; {_saved(folder)}") from error


def _line(error: Exception, config: Config) -> str | None:
    """Cause and mend; None for an error that is none of the machine's."""
    text = str(error)
    own = text.strip().splitlines()[-1].strip() if text.strip() else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text.lower():
        wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
        return f"the memory of the device is full{f' ({wanted[1]} more wanted)' if wanted else ''}: {_smaller(config)}"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"the memory of this machine is full: {_smaller(config)}, or use fewer --workers"
    if killed := re.search(r"DataLoader worker \(pid.*?\) (?:is|was) killed by signal: ([\w ]+)", text):
        return _killed(killed[1].strip(), config)
    if re.search(r"DataLoader worker \(pid.*?exited unexpectedly", text):
        return _killed("", config)
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or own}: {_MENDS.get(error.errno, 'mend that')}"
    if "DataLoader worker" in text and (number := re.search(r"\[Errno (\d+)\] ([^\n]*)", text)):
        return f"{number[2]}, in a process that loads images: {_MENDS.get(int(number[1]), 'mend that')}"
    return None


def _smaller(config: Config) -> str:
    """What to make smaller, with its present value."""
    train, model = config.train, config.model
    return (
        f"use a smaller --batch-size (now {train.batch_size}; --effective-batch keeps what the optimiser sees) or "
        f"--image-size (now {model.image_size}), or --set model.gradient_checkpointing=true"
    )


def _killed(how: str, config: Config) -> str:
    if how == "Bus error":
        return (
            f"shared memory is full (/dev/shm), of which a process that loads images died: use fewer --workers "
            f"(now {config.data.workers}) or make it larger (docker run --shm-size)"
        )
    said = f" ({how})" if how else ""
    return (
        f"a process that loads images was killed{said}, as the system does where memory is full: use fewer --workers "
        f"(now {config.data.workers}; 0: none) or a smaller --batch-size (now {config.train.batch_size})"
    )


def _saved(folder: RunFolder) -> str:
    if generations(folder.last):
        return "the last checkpoint is good: go on with --resume"
    return "nothing was saved yet: start again with --resume"
