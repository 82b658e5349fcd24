"""Optional packages: how to ask for one, and how to keep it quiet."""

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from .errors import UserError


def need(package: str, extra: str = "export") -> Any:
    """Import an optional package. Raises UserError, naming the `extra` that brings it, if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{package} is not installed: pip install 'deformable-detr[{extra}]'") from None


@contextlib.contextmanager
def quiet_loggers(*names: str) -> Iterator[None]:
    """Let these loggers report errors only."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let transformers report errors only, without progress bars."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with quiet_loggers("transformers"):
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the warnings and progress lines of PyTorch's exporter."""
    with (
        quiet_loggers("torch.onnx", "onnxscript", "onnx_ir", "torch.export"),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
