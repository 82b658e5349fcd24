"""Entry point of `deformable-detr` and `python -m deformable_detr`."""

import signal
import sys

from .utils.interrupts import exit_on_interrupt, interrupt

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupt)  # before the imports, which take seconds

from .cli import main

__all__ = ["run"]


def run() -> None:
    """Run the command of the command line and exit."""
    try:
        main()
    except KeyboardInterrupt:  # outside the command itself
        sys.exit(130)
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, exit_on_interrupt)


if __name__ == "__main__":
    run()
