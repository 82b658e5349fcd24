"""glibc's memory allocator, told to keep large buffers instead of giving them back and asking again each time."""

from __future__ import annotations

import ctypes
import logging
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_log = logging.getLogger(__name__)


def keep_large_buffers() -> bool:
    """Saves the page faults of activations that come and go at every step; whether it could.

    For our own commands only: a program that uses the library chooses its allocator itself.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    kept = bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))
    _log.debug("allocator: large buffers are kept" if kept else "allocator: settings refused")
    return kept
