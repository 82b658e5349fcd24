"""Ctrl-C while Python starts and ends, when an exception would be swallowed or printed with a traceback."""

import os
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Raise KeyboardInterrupt, but exit at once during an import: modules catch exceptions of those they import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            exit_on_interrupt()
        frame = frame.f_back
    raise KeyboardInterrupt


def exit_on_interrupt(*_: object) -> NoReturn:
    """Exit with code 130 without any cleanup."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # the stream may be in use
            stream.flush()
    os._exit(130)
