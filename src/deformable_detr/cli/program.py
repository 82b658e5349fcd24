"""The program that the verbs register with."""

from __future__ import annotations

from cyclopts import App

from .. import __version__

app = App(
    name="deformable-detr",
    help="Object detection with multi-scale deformable attention: check, train, evaluate, predict.",
    version=__version__,
    help_format="plaintext",
)
