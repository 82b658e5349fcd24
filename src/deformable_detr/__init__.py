"""Deformable DETR: object detection with multi-scale deformable attention.

Public names are imported on first use, so that `import deformable_detr` and `--help` do not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import presets
    from .config.schema import Config, DataConfig, ModelConfig, TrainConfig
    from .detector import DeformableDETR, load_detector
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
    "load_detector",
    "presets",
    "train",
]

_NAMES = {
    ".config.schema": ("Config", "DataConfig", "ModelConfig", "TrainConfig"),
    ".detector": ("DeformableDETR", "load_detector"),
    ".evaluation": ("evaluate",),
    ".explanation": ("explain",),
    ".structures": ("Detections", "ImageBatch", "Target"),
    ".training": ("train",),
    ".utils.errors": ("UserError",),
}


def __getattr__(name: str) -> Any:
    if name == "presets":
        return import_module(".config.presets", __name__)
    for module, names in _NAMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(module, __name__), name)  # later lookups skip this function
            return value
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
