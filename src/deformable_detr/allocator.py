"""glibc's memory allocator, told to keep large buffers instead of giving them back and asking again each time."""

from __future__ import annotations

import ctypes
import logging
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = (1 << 30, 32 << 20)  # bytes; glibc before 2.35 takes the second at most
_log = logging.getLogger(__name__)


def keep_large_buffers() -> bool:
    """Saves the page faults of activations that come and go at every step; whether it could.

    For our own commands only: a program that uses the library chooses its allocator itself.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is None:  # musl has none
        _log.info("allocator: left as it is, this is not glibc")
        return False
    for largest in _LARGEST:
        if mallopt(_M_MMAP_THRESHOLD, largest) and mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1):
            _log.info(
                "allocator: freed buffers up to %d MiB are kept for the next ones, which saves page faults; the "
                "process keeps the memory of its peak",
                largest >> 20,
            )
            return True
    _log.info("allocator: left as it is, glibc refused the setting")
    return False
