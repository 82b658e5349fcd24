"""Evaluation: COCO metrics of detections, datasets and models."""

from .evaluator import EvaluationResult, evaluate, evaluate_dataset, evaluate_models
from .metrics import coco_metrics

__all__ = ["EvaluationResult", "coco_metrics", "evaluate", "evaluate_dataset", "evaluate_models"]
