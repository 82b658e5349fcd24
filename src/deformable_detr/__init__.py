"""Deformable DETR: train, evaluate and predict with multi-scale deformable attention. Public names, nothing else."""

from . import presets
from .config import Config, DataConfig, ModelConfig, TrainConfig
from .errors import UserError
from .model.detector import DeformableDETR
from .structures import ImageBatch, Target

__version__ = "0.1.0"

__all__ = [
    "Config",
    "DataConfig",
    "DeformableDETR",
    "ImageBatch",
    "ModelConfig",
    "Target",
    "TrainConfig",
    "UserError",
    "presets",
]
