"""Deformable DETR: object detection with multi-scale deformable attention.

Public names are imported on first use, so that `import deformable_detr` and `--help` do not import torch.
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

_MODULES = {
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
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(import_module(_MODULES[name], __name__), name)
    globals()[name] = value  # later lookups skip this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
