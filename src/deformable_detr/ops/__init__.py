"""Multi-scale deformable attention, on every machine."""

from .reference import deformable_attention, sample_and_sum, sampling_locations

__all__ = ["deformable_attention", "sample_and_sum", "sampling_locations"]
