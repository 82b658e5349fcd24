"""Training: matching and losses, the optimizer, the loop, and the runs it leaves behind."""

from .api import train
from .criterion import SetCriterion
from .trainer import train_model

__all__ = ["SetCriterion", "train", "train_model"]
