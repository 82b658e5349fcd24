"""What our commands ask of the C library's allocator, PyTorch's kernels and OpenMP: what to keep, how long to wait."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Sequence

_M_MXFAST, _M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = 1, -1, -3  # malloc.h
_BEGUN = "DEFORMABLE_DETR_BEGUN_ANEW"  # the process that was, if its own environment has it
_LARGEST = (1 << 30, 32 << 20)  # bytes; glibc before 2.35 takes the second at most
_log = logging.getLogger(__name__)


def compares(words: Sequence[str]) -> bool:
    """Whether a command's words ask for a benchmark that compares programs as they come, with nothing set for them."""
    verbs = [word for word in words if word != "--verbose"]
    return verbs[:1] == ["benchmark"] and verbs[1:2] != ["predict"]


def begin_without_thread_caches() -> None:
    """Begins this program anew, as the same process, with glibc's cache of small blocks for each thread switched off.

    A buffer that begins at a multiple of so many bytes leaves a few of them in front of it. Where the cache has these
    for others, the hole that the buffer leaves is too small for the next one of its size: half of the free memory of a
    prediction over images of many sizes was such holes. glibc takes the setting when a program begins, never later.

    Nothing happens where the environment has the setting already, whatever its value, and with another C library.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.tcache_count" in tunables or not sys.executable or not _is_glibc():
        return
    # glibc takes the setting away from interpreters with capabilities of their own: once and no more.
    if os.environ.get(_BEGUN) == str(os.getpid()):
        return
    os.environ[_BEGUN] = str(os.getpid())
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, "glibc.malloc.tcache_count=0")))
    with contextlib.suppress(OSError):  # a system that forbids it: the program goes on with more memory
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_glibc() -> bool:
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, ValueError, OSError):  # Windows; macOS, musl
        return False


def retain_freed_memory() -> bool:
    """glibc keeps large buffers. Saves the page faults of activations that come and go at every step; whether it could.

    For our own commands only: a program that uses the library chooses its allocator itself.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is None:  # musl has none
        _log.info("allocator: left as it is, this is not glibc")
        return False
    for largest in _LARGEST:
        if mallopt(_M_MMAP_THRESHOLD, largest) and mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1):
            mallopt(_M_MXFAST, 0)  # no small blocks for all threads either: `begin_without_thread_caches`
            _log.info(
                "allocator: freed buffers up to %d MiB are kept for the next ones, which saves page faults; the "
                "process keeps the memory of its peak (GLIBC_TUNABLES: %s)",
                largest >> 20,
                os.environ.get("GLIBC_TUNABLES") or "none",
            )
            return True
    _log.info("allocator: left as it is, glibc refused the setting")
    return False


def give_back() -> None:
    """Lets the system have the free memory that glibc keeps; where the allocator is another, nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def keep_fewer_kernels() -> None:
    """The code of the latest 256 of oneDNN's calls is kept instead of 1024; an environment that says how many decides.

    Images of many sizes need new ones again and again, a fifth of a MiB each, and hardly meet them again. A training
    step of the largest preset has 184 of them. oneDNN keeps them and, whatever its own number, PyTorch's part in front
    of it those of convolutions once more. To be called before the first one.
    """
    for of, name in (("oneDNN", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"), ("PyTorch", "LRU_CACHE_CAPACITY")):
        _log.info("%s keeps the code of its latest %s calls (%s)", of, os.environ.setdefault(name, "256"), name)


def shorten_omp_spin() -> None:
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
