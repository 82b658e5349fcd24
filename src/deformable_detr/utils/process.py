"""Settings of our own commands for signals, the C library's allocator, oneDNN and OpenMP.

A program that uses the library makes these choices itself.
"""

import ctypes
import logging
import os
import signal
import sys
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MMAP_THRESHOLDS = (1 << 30, 32 << 20)  # bytes; glibc before 2.35 accepts at most the second
# Ctrl-C, the end asked for by a launcher, a lost terminal, and SLURM's warning before the time limit.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
_log = logging.getLogger(__name__)


def retain_freed_memory() -> bool:
    """Let glibc keep large freed buffers, which saves page faults at every step. Returns whether it accepted that."""
    mallopt = _libc_function("mallopt")
    for threshold in _MMAP_THRESHOLDS if mallopt else ():
        if mallopt(_M_MMAP_THRESHOLD, threshold) and mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1):
            _log.info("allocator: keeps freed buffers up to %d MiB", threshold >> 20)
            return True
    _log.info("allocator: unchanged, this is not glibc or it refused the setting")
    return False


def malloc_trim() -> None:
    """Return the free memory that glibc keeps to the system; do nothing with other allocators."""
    trim = _libc_function("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))


def limit_primitive_caches() -> None:
    """Cache 256 compiled oneDNN primitives instead of 1024, unless the environment sets a limit.

    Images of many sizes need new primitives of 0.2 MiB each and rarely reuse them. Call this before inference.
    """
    for library, variable in (("oneDNN", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"), ("PyTorch", "LRU_CACHE_CAPACITY")):
        _log.info("%s caches %s primitives (%s)", library, os.environ.setdefault(variable, "256"), variable)


def shorten_omp_spin() -> None:
    """Let idle OpenMP threads sleep soon, unless the environment decides. Call this before importing torch.

    GCC's OpenMP spins for milliseconds, which keeps other processes, such as data loaders, from the CPU: a step can
    take ten times as long.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        _log.info("OpenMP: OMP_WAIT_POLICY decides how threads wait")
        return
    _log.info("OpenMP: threads spin %s times (GOMP_SPINCOUNT)", os.environ.setdefault("GOMP_SPINCOUNT", "10000"))


def _libc_function(name: str) -> Any:
    """Return a function of glibc; None if the C library lacks it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
