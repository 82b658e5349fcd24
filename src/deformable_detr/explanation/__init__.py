"""Explanations: which points of the image each layer sampled, as arrays, figures and a web page."""

from .explanation import DetectionExplanation, Explanation, PointExplanation
from .trace import Trace, explain, trace

__all__ = ["DetectionExplanation", "Explanation", "PointExplanation", "Trace", "explain", "trace"]
