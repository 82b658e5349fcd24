"""Training: matching and losses, the optimiser, the loop, and the runs it leaves behind."""

from .api import train
from .criterion import DetectionLoss
from .trainer import train_model

__all__ = ["DetectionLoss", "train", "train_model"]
