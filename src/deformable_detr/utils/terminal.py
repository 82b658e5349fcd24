"""Print texts that can contain names from files, whose control characters a terminal would obey."""

import logging
import re
import sys
from contextlib import AbstractContextManager, nullcontext

# C0 without tab and line feed, DEL, C1, and the characters that reverse the direction of a line.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return a text with its control characters escaped, such as \\x1b, except tabs and line feeds."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def printable_name(name: str) -> str:
    """Return a name as `printable` does, on one line."""
    return printable(name).replace("\n", "\\n")


def echo(text: str) -> None:
    """Print a text to standard output with its control characters escaped, above the progress bars."""
    with above_bars():
        print(printable(text))


def above_bars() -> AbstractContextManager[None]:
    """Return a context that hides the progress bars on a terminal, so that lines can be printed above them."""
    tqdm = sys.modules.get("tqdm")  # not imported: there are no bars
    return nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode()


class PrintableFormatter(logging.Formatter):
    """Format log records with their control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
