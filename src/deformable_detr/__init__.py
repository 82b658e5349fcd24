"""Deformable DETR: train, evaluate and predict with multi-scale deformable attention. The public names, nothing else."""

from . import presets
from .config import Config, DataConfig, ModelConfig, TrainConfig
from .errors import UserError

__version__ = "0.1.0"

__all__ = ["Config", "DataConfig", "ModelConfig", "TrainConfig", "UserError", "presets"]
