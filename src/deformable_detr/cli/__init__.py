"""The command line: one module per command. Commands import torch only when they run."""

from .app import app, main

__all__ = ["app", "main"]
