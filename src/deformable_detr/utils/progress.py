"""Progress of long work: a bar on a terminal and in a notebook; elsewhere, as in a log, a line now and then."""

import io
import sys
import time
from typing import Any

from tqdm import tqdm

from .terminal import printable, printable_name

FIRST_LINE, MAX_INTERVAL = 10.0, 600.0  # seconds; without a terminal, the time between two lines doubles
NOTEBOOK_WIDTH = 100  # characters
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} elapsed, {remaining} left"


class ProgressBar(tqdm):
    """A bar on a terminal. Use it as a context manager, call `update` or iterate over it."""

    def stage(self, name: str) -> None:
        """Show the next of `total` stages, for a bar of `stage_bar`."""
        self.n += 1
        self.set_postfix_str(printable_name(name))


class _NotebookBar(ProgressBar):
    """A line that a notebook updates in place and keeps when it is saved."""

    def __init__(self, **options: Any) -> None:
        self._handle: Any = None
        options |= {"file": io.StringIO(), "ascii": False, "ncols": NOTEBOOK_WIDTH, "dynamic_ncols": False}
        super().__init__(**options | {"mininterval": 0.5, "leave": True})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        content = {"text/plain": str(self) if msg is None else msg}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)
        return True

    def clear(self, nolock: bool = False) -> None:
        """Do nothing: other output has its own place."""


class _Lines(ProgressBar):
    """Lines on standard error without control characters; none for work that is done soon."""

    def __init__(self, line_format: str = LINE, **options: Any) -> None:
        self._wait, self._next = FIRST_LINE, time.monotonic() + FIRST_LINE
        options |= {"bar_format": line_format, "file": sys.stderr, "mininterval": 1.0, "miniters": 1, "leave": False}
        super().__init__(**options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg is None and time.monotonic() >= self._next:
            print(self, file=sys.stderr, flush=True)
            self._wait = min(2 * self._wait, MAX_INTERVAL)
            self._next = time.monotonic() + self._wait
        return False

    def clear(self, nolock: bool = False) -> None:
        """Do nothing: lines stay."""


def progress_bar(
    total: float | None, unit: str, name: str, show: bool = True, keep: bool = True,
    bar_format: str | None = None, line_format: str = LINE,
) -> ProgressBar:  # fmt: skip
    """Return a bar for counted work.

    Args:
        total: Number of units; None: unknown.
        unit: What is counted, in the plural.
        name: What is done.
        show: False: show nothing.
        keep: Leave the finished bar on the terminal.
        bar_format: Layout of the bar, as for `tqdm`.
        line_format: Layout of the lines where there is neither a terminal nor a notebook.
    """
    kind = bar_class()
    options: dict[str, Any] = {"bar_format": bar_format, "dynamic_ncols": True}
    options = {"line_format": line_format} if kind is _Lines else options
    return kind(total=total, unit=unit, desc=printable_name(name), disable=not show, leave=keep, **options)


def stage_bar(name: str, count: int | None, show: bool = True) -> ProgressBar:
    """Return a bar for work in stages of unknown length; call `stage` when one begins. count: None if unknown."""
    layout = "{desc}, step {n_fmt}" + ("{postfix}" if count is None else " of {total_fmt}{postfix}")
    return progress_bar(count, "steps", name, show, keep=False, bar_format=layout, line_format=layout)


def bar_class() -> type[ProgressBar]:
    """Return the class of bars that suits the output of this process."""
    return _NotebookBar if in_notebook() else ProgressBar if sys.stderr.isatty() else _Lines


def write_line(text: str) -> None:
    """Print a text above the bars: on standard error; in a notebook, which marks that as errors, on standard output."""
    ProgressBar.write(printable(text), file=sys.stdout if in_notebook() else sys.stderr)


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config
