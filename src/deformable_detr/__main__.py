"""The command line: `deformable-detr` and `python -m deformable_detr`."""

from __future__ import annotations

import sys

from .utils.process import begin_without_thread_caches, compares


def run() -> None:
    """The command that this program was started with; see `cli.main`."""
    if not compares(sys.argv[1:]):
        begin_without_thread_caches()
    from .cli import main  # takes a while: not before it is clear that the program goes on

    main()


if __name__ == "__main__":
    run()
