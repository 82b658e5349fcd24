"""What our commands ask of the C library's allocator, oneDNN and OpenMP: what to keep, and how long to wait for it."""

from __future__ import annotations

import ctypes
import logging
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = (1 << 30, 32 << 20)  # bytes; glibc before 2.35 takes the second at most
_log = logging.getLogger(__name__)


def keep_large_buffers() -> bool:
    """glibc keeps large buffers. Saves the page faults of activations that come and go at every step; whether it could.

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


def begin_at_pages() -> None:
    """PyTorch's buffers of 2 MiB and more begin at a page, a huge one where there are; an environment decides.

    Those of images of many sizes leave fewer holes between them that none of the next ones fits in: a tenth to two
    fifths less memory in prediction, but more in training. To be called before torch is imported.
    """
    said = os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _log.info("large buffers begin at pages: %s (THP_MEM_ALLOC_ENABLE)", said)


def give_back() -> None:
    """Lets the system have the free memory that glibc keeps; where the allocator is another, nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def keep_fewer_kernels() -> None:
    """oneDNN keeps the code of the latest 256 of its calls instead of 1024; an environment that says how many decides.

    Images of many sizes need new ones again and again, a fifth of a MiB each, and hardly meet them again. A training
    step of the largest preset has 184 of them. To be called before the first one.
    """
    kept = os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    _log.info("oneDNN keeps the code of its latest %s calls (ONEDNN_PRIMITIVE_CACHE_CAPACITY)", kept)


def wait_shortly() -> None:
    """Threads that wait for the others of a product give the processor away soon; an environment that says how decides.

    GCC's OpenMP lets them spin for milliseconds, which pays as long as nothing else runs. Where something does, and be
    it the processes that load images, the spinning ones keep the late one from its processor at every product: a step
    takes up to ten times as long. To be called before torch is imported.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        _log.info("threads wait as OMP_WAIT_POLICY says")
        return
    spins = os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    _log.info("waiting threads look %s times before they sleep (GOMP_SPINCOUNT)", spins)
