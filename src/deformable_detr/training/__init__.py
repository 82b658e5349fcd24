"""Training: matching and losses, the optimiser, the loop, and the runs it leaves behind."""

from .api import train
from .loop import train_model
from .losses import DetectionLoss

__all__ = ["DetectionLoss", "train", "train_model"]
