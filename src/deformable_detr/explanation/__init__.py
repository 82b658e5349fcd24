"""Explanations: where a model looked, as arrays, pictures and a page."""

from .explain import explain
from .results import DecoderLook, DetectionExplanation, EncoderLook, Explanation, PointExplanation, attention_share
from .trace import Trace, trace

__all__ = [
    "DecoderLook",
    "DetectionExplanation",
    "EncoderLook",
    "Explanation",
    "PointExplanation",
    "Trace",
    "attention_share",
    "explain",
    "trace",
]
