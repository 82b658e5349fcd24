"""Deformable DETR: train, evaluate and predict with multi-scale deformable attention. The public names, nothing else.

Each is imported at first use, so that the command line can answer `--help` at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import presets
    from .config.schema import Config, DataConfig, ModelConfig, TrainConfig
    from .detector import DeformableDETR
    from .evaluation import evaluate
    from .explanation import explain
    from .structures import Detections, ImageBatch, Target
    from .training import train
    from .utils.errors import UserError

__version__ = "0.1.0"

__all__ = [
    "Config",
    "DataConfig",
    "DeformableDETR",
    "Detections",
    "ImageBatch",
    "ModelConfig",
    "Target",
    "TrainConfig",
    "UserError",
    "evaluate",
    "explain",
    "presets",
    "train",
]

_HOMES = {
    "Config": ".config.schema",
    "DataConfig": ".config.schema",
    "DeformableDETR": ".detector",
    "Detections": ".structures",
    "ImageBatch": ".structures",
    "ModelConfig": ".config.schema",
    "Target": ".structures",
    "TrainConfig": ".config.schema",
    "UserError": ".utils.errors",
    "evaluate": ".evaluation",
    "explain": ".explanation",
    "train": ".training",
}


def __getattr__(name: str) -> Any:
    if name == "presets":
        return import_module(".config.presets", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
