"""How good a model is: COCO figures of detections, of a data set, of a model."""

from .coco import coco_metrics
from .run import detect, evaluate, evaluate_dataset

__all__ = ["coco_metrics", "detect", "evaluate", "evaluate_dataset"]
