"""Giving memory back after large images."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


def give_back() -> None:
    """Lets the system have what the allocator keeps for later; where it is not glibc's, nothing happens.

    The command line tells the allocator to keep large buffers, which are the model's, again and again. A picture of 50
    megapixels leaves hundreds of megabytes with it that nobody may ever need again.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
