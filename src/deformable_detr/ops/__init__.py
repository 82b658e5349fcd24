"""Multi-scale deformable attention, on every machine."""

from .accelerate import accelerate, restore
from .dispatch import Backend, backends, deformable_attention, sample_and_sum, use_backend
from .reference import Shapes, sampling_locations

__all__ = [
    "Backend",
    "Shapes",
    "accelerate",
    "backends",
    "deformable_attention",
    "restore",
    "sample_and_sum",
    "sampling_locations",
    "use_backend",
]
