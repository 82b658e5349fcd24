"""How good a model is: COCO figures of detections, of a data set, of a model."""

from .evaluator import detect, evaluate, evaluate_dataset
from .metrics import coco_metrics

__all__ = ["coco_metrics", "detect", "evaluate", "evaluate_dataset"]
