"""Models made ready for inference."""

from .detector import OptimisedDetector

__all__ = ["OptimisedDetector"]
