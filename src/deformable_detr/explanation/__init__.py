"""Explanations: where a model looked, as arrays, pictures and a page."""

from .explain import explain
from .results import (
    DecoderLayerSampling,
    DetectionExplanation,
    EncoderLayerSampling,
    Explanation,
    PointExplanation,
    attention_inside_box,
)
from .trace import Trace, trace

__all__ = [
    "DecoderLayerSampling",
    "DetectionExplanation",
    "EncoderLayerSampling",
    "Explanation",
    "PointExplanation",
    "Trace",
    "attention_inside_box",
    "explain",
    "trace",
]
