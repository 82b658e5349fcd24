"""Explanations: which points of the image each layer sampled, as arrays, figures and a web page."""

from .explanation import DetectionExplanation, Explanation, PointExplanation
from .results import DecoderLayerSampling, EncoderLayerSampling, attention_inside_box
from .trace import Trace, explain, trace

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
