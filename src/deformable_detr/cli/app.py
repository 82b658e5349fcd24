"""The command-line app: commands, exit codes, signals and broken pipes."""

import io
import logging
import os
import select
import signal
import sys
import threading
import warnings
from itertools import pairwise

from cyclopts import App, CycloptsError

from .. import __version__
from ..distributed.launch import is_local_rank_zero
from ..utils.errors import UserError
from ..utils.process import STOP_SIGNALS, limit_primitive_caches, retain_freed_memory, shorten_omp_spin
from ..utils.terminal import PrintableFormatter
from .benchmark import benchmark
from .check import check
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .explain import explain
from .export import export
from .models import models
from .options import print_error
from .predict import predict
from .predict_dataset import predict_dataset
from .serve import serve
from .split import split
from .train import train

app = App(
    name="deformable-detr",
    help="Object detection with multi-scale deformable attention.\n\n"
    "Every command accepts --verbose, which logs backends, weight layouts and process settings.",
    version=__version__,
    help_format="plaintext",
)
for command in (
    train, check, split, demo, evaluate, predict, explain, convert, export, serve, predict_dataset, benchmark, models
):  # fmt: skip
    app.command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit.

    Exit codes: 0 success, 1 the demo's AP50 is too low, 2 user error, 130 interrupted (Ctrl-C), 141 the reader of
    standard output is gone, as after `| head`, 143 terminated (SIGTERM), 129 the terminal is gone (SIGHUP).

    Args:
        arguments: Command-line arguments. Default: those of the process.
    """
    arguments = _configure_logging(list(sys.argv[1:] if arguments is None else arguments))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be encodable
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about image files that Pillow reads anyway
    _exit_cleanly_on_signals()
    retain_freed_memory()
    if arguments[:1] != ["benchmark"]:  # it compares with programs that do not change these settings
        limit_primitive_caches()
        shorten_omp_spin()
    try:
        try:
            _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _stdout_is_broken():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discard the rest of the output
        sys.exit(128 + 13)  # SIGPIPE, which Windows lacks


def _configure_logging(arguments: list[str]) -> list[str]:
    """Enable logging for --verbose; return the other arguments. Other commands log warnings by Python's last resort."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(PrintableFormatter())
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--verbose" in options:
        arguments.remove("--verbose")
        handler = logging.StreamHandler()
        handler.setFormatter(PrintableFormatter("%(name)s: %(message)s"))
        logging.basicConfig(handlers=[handler])
        logging.getLogger("deformable_detr").setLevel(logging.INFO)
    return arguments


def _run(arguments: list[str]) -> None:
    try:
        _reject_empty(arguments)
        app(arguments, exit_on_error=False, print_error=False, result_action="return_none")
    except (UserError, CycloptsError) as error:
        if isinstance(error, CycloptsError):
            error.verbose = False
        if is_local_rank_zero() or getattr(error, "one_process", False):  # torchrun: all processes have the others
            print_error(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _reject_empty(arguments: list[str]) -> None:
    """Reject empty arguments, which as paths would mean the current folder."""
    for previous, argument in pairwise(["", *arguments]):
        option, equals, value = argument.partition("=")
        if not argument or (option.startswith("--") and equals and not value):
            after = f"after {option or previous}" if option or previous else "at the start"
            raise UserError(f'empty argument ("") {after}: check that the shell variable is set')


def _exit_cleanly_on_signals() -> None:
    """Turn signals into SystemExit, so that temporary files are removed, unless the parent process set a handler."""
    process = os.getpid()

    def handle(number: int, _: object) -> None:
        if os.getpid() != process:  # a forked process inherited the handler
            os._exit(128 + number)
        sys.exit(128 + number)

    in_main_thread = threading.current_thread() is threading.main_thread()  # only it may set handlers
    for number in STOP_SIGNALS if in_main_thread else ():
        if signal.getsignal(number) is signal.SIG_DFL:  # Ctrl-C has Python's handler
            signal.signal(number, handle)


def _stdout_is_broken() -> bool:
    """Return whether the reader of standard output is gone."""
    try:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError):  # no poll on Windows; no file behind a notebook's output
        return False
    return bool(output.poll(0))
