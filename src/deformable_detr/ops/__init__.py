"""Multi-scale deformable attention on CPUs and GPUs, and its use in transformers' models.

Dimensions in all files: B images, S tokens of all levels, Q queries, M heads, D channels per head, L levels, P points.
"""

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
