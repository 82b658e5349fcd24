"""The program that the verbs register with."""

from __future__ import annotations

from cyclopts import App

from .. import __version__

app = App(
    name="deformable-detr",
    help="Object detection with multi-scale deformable attention: check, train, evaluate, predict.\n\n"
    "Any command takes --verbose too: what was chosen (backend, weight layout, allocator) is then logged.",
    version=__version__,
    help_format="plaintext",
)
