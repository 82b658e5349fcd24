"""Failures of the machine (memory or disk full, killed processes) as one-line errors."""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import UserError, first_line

_FIXES = {
    errno.ENOSPC: "free some disk space",
    errno.EDQUOT: "free some space in your disk quota",
    errno.EMFILE: "use fewer --workers, or raise the limit of open files (ulimit -n)",
    errno.ENFILE: "use fewer --workers, or raise the system's limit of open files",
    errno.ENOMEM: "use fewer --workers or a smaller --batch-size",
}
_OTHER_FIX = "fix this and try again"


@contextmanager
def explain_machine_errors(
    batch_size: int, workers: int, memory_fix: str | None = None, suffix: Callable[[], str] = lambda: ""
) -> Iterator[None]:
    """Raise a `UserError` instead of an error of full memory or disk, open files or a killed data loader process.

    Args:
        batch_size, workers: The values of `--batch-size` and `--workers`, for the message.
        memory_fix: What to do if memory is full. Default: use a smaller batch size.
        suffix: Returns text to append to the message.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        memory_fix = memory_fix or f"use a smaller --batch-size (now {batch_size})"
        message = _explain(error, memory_fix, batch_size, workers)
        if message is None:
            raise
        raise UserError(message + suffix()) from error


def _explain(error: Exception, memory_fix: str, batch_size: int, workers: int) -> str | None:
    """Return cause and fix; None if the machine is not the cause."""
    text = str(error)
    if "out of memory" in text.lower():
        size = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
        return f"the device is out of memory{f' (tried to allocate {size[1]})' if size else ''}: {memory_fix}"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"this machine is out of memory: {memory_fix}{', or use fewer --workers' if workers else ''}"
    ending = r"DataLoader worker \(pid.*?(?:\) (?:is|was) killed by signal: ([\w ]+)|exited unexpectedly)"
    if killed := re.search(ending, text):
        return _explain_ended_worker((killed[1] or "").strip(), batch_size, workers)
    if isinstance(error, OSError) and error.errno is not None:
        prefix = f"{error.filename}: " if error.filename else ""
        return f"{prefix}{error.strerror or first_line(error)}: {_FIXES.get(error.errno, _OTHER_FIX)}"
    if "DataLoader worker" in text and (match := re.search(r"\[Errno (\d+)\] ([^\n]*)", text)):
        return f"{match[2]}, in a data loader process: {_FIXES.get(int(match[1]), _OTHER_FIX)}"
    return None


def _explain_ended_worker(signal: str, batch_size: int, workers: int) -> str:
    fewer = f"use fewer --workers (now {workers}; 0 loads in the main process)"
    if signal == "Bus error":
        return f"shared memory (/dev/shm) is probably full: {fewer}, or increase it (docker run --shm-size)"
    if signal == "Killed":
        return (
            f"a data loader process was killed (SIGKILL), probably because memory is full: {fewer} "
            f"or a smaller --batch-size (now {batch_size})"
        )
    ending = f"crashed ({signal})" if signal else "ended unexpectedly; see above for its error, if it printed one"
    return f"a data loader process {ending}: use --workers 0 (now {workers}), which loads in the main process"
