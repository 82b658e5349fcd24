"""The command line: one verb a function, no logic of its own. torch is imported once the verb is known."""

from __future__ import annotations

import io
import logging
import os
import select
import signal
import sys
import threading
import warnings
from itertools import pairwise

from cyclopts import CycloptsError

from ..utils.errors import UserError
from ..utils.process import limit_primitive_caches, retain_freed_memory, shorten_omp_spin
from . import benchmark, deploy, infer, train
from .app import app
from .options import complain

__all__ = ["app", "benchmark", "deploy", "infer", "main", "train"]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and exits: 0 done, 1 the demo learnt too little, 2 a mistake in the input, 130 interrupted.

    141 where nobody reads what is printed any more, as after `| head`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = words[: words.index("--")] if "--" in words else words
    if "--verbose" in options:
        words.remove("--verbose")
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("deformable_detr").setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no text, or not of the terminal's letters
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of files that it reads all the same; others are errors
    _tidy_up_at_sigterm()
    retain_freed_memory()
    limit_primitive_caches()
    shorten_omp_spin()
    try:
        try:
            _run(words)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where what is left goes
        sys.exit(128 + 13)  # what a shell says of a program that SIGPIPE ended


def _run(words: list[str]) -> None:
    try:
        _refuse_empty(words)
        app(words, exit_on_error=False, print_error=False, result_action="return_none")
    except UserError as error:
        complain(str(error))
        sys.exit(2)
    except CycloptsError as error:
        error.verbose = False
        complain(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _refuse_empty(words: list[str]) -> None:
    """An empty argument would be the folder that one happens to be in."""
    for before, word in pairwise(["", *words]):
        option, equals, value = word.partition("=")
        if not word or (option.startswith("--") and equals and not value):
            after = option or before
            place = f"after {after}" if after else "in the first place"
            raise UserError(f'an argument is empty ("") {place}: perhaps a variable of the shell is not set')


def _tidy_up_at_sigterm() -> None:
    """SIGTERM ends the program as an error would, so that nothing half-written stays; unless a parent decided."""
    process = os.getpid()

    def leave(number: int, _: object) -> None:
        if os.getpid() != process:  # a process that inherited this
            os._exit(128 + number)
        sys.exit(128 + number)

    main_thread = threading.current_thread() is threading.main_thread()  # Python allows handlers nowhere else
    if main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, leave)


def _reader_gone() -> bool:
    """Whether it is standard output that is closed at its other end."""
    try:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError):  # no poll on Windows; no file behind a notebook's output
        return False
    return bool(output.poll(0))
