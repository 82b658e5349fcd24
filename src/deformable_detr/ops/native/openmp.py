"""Find the OpenMP runtime that torch has loaded, so that the library shares its threads.

| platform | file of torch's wheel | entry points |
|---|---|---|
| Linux | libgomp.so.1 | GOMP_parallel, also in Intel's and LLVM's runtime |
| macOS | libomp.dylib (LLVM) | GOMP_parallel |
| Windows | libiomp5md.dll (Intel), else vcomp140.dll (Microsoft) | _vcomp_fork, _vcomp_set_num_threads |

Nothing here loads a runtime: a second one would add a second pool of threads.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_TORCH_LIBRARIES = Path(torch.__file__).parent / "lib"


def entry_points() -> tuple[int, int | None] | None:
    """Return the addresses that `msda_use_openmp` takes; None if torch has loaded no runtime that has them."""
    names = ("_vcomp_fork", "_vcomp_set_num_threads") if sys.platform == "win32" else ("GOMP_parallel",)
    for runtime in _loaded_runtimes():
        if all(hasattr(runtime, name) for name in names):
            fork, *rest = (ctypes.cast(getattr(runtime, name), ctypes.c_void_p).value for name in names)
            assert fork is not None
            return fork, rest[0] if rest else None
    return None


def _loaded_runtimes() -> Iterator[ctypes.CDLL]:
    if sys.platform == "win32":
        kernel32: Any = ctypes.WinDLL("kernel32")
        kernel32.GetModuleHandleW.restype = ctypes.c_void_p
        for name in ("libiomp5md.dll", "vcomp140.dll"):
            if handle := kernel32.GetModuleHandleW(ctypes.c_wchar_p(name)):
                yield ctypes.CDLL(name, handle=handle)
    elif sys.platform == "darwin":
        yield from _loaded(_TORCH_LIBRARIES / "libomp.dylib")
        yield ctypes.CDLL(None)
    else:
        # The global names first: torch itself prefers them, as with LD_PRELOAD=libiomp5.so. Some torch wheels do not
        # add their runtime to these.
        yield ctypes.CDLL(None)
        yield from _loaded("libgomp.so.1")


def _loaded(name: str | Path) -> Iterator[ctypes.CDLL]:
    try:
        yield ctypes.CDLL(os.fspath(name), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return
