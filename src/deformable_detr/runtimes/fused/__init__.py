"""Models made ready for inference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .detector import OptimizedDetector

if TYPE_CHECKING:
    from ...model.network import DeformableDETRNetwork

__all__ = ["OptimizedDetector", "optimized"]


def optimized(
    model: DeformableDETRNetwork, precision: str = "fp32", compile: bool = False, bucket: int | None = None
) -> OptimizedDetector:
    """`DeformableDETR.optimize`. Raises UserError for a precision or bucket that cannot be."""
    from ...utils.errors import UserError

    if bucket is not None and bucket < 1:
        raise UserError(f"bucket {bucket} is under 1")
    made = OptimizedDetector(model, precision, packed=False if compile else None)
    if compile or bucket is not None:
        from .compiled import specialize

        specialize(made, compile, bucket)
    return made
