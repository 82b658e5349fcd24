"""Multi-scale deformable attention, on every machine."""

from .reference import Shapes, deformable_attention, sample_and_sum, sampling_locations

__all__ = ["Shapes", "deformable_attention", "sample_and_sum", "sampling_locations"]
