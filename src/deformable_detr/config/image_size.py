"""The size that an image has when it enters the model."""

from __future__ import annotations

from .schema import ModelConfig


def resized_size(height: int, width: int, image_size: int, long_side: int, multiple: int = 1) -> tuple[int, int]:
    """(height, width) after `resize`.

    The short side becomes `image_size` and the long one keeps the proportions, rounded down. Where that is more than
    `long_side`, the long side becomes `long_side` at most and the short one is rounded to the nearest. No side is
    under 1. Then both go to the nearest multiple of `multiple`, at least one of it.
    """
    short, long = min(height, width), max(height, width)
    if long * image_size > long_side * short:
        new_short = max(1, round(long_side * short / long))
        new_long = min(long_side, max(1, new_short * long // short))
    else:
        new_short, new_long = image_size, image_size * long // short
    if multiple > 1:
        new_short, new_long = (max(1, (side + multiple // 2) // multiple) * multiple for side in (new_short, new_long))
    return (new_short, new_long) if height <= width else (new_long, new_short)


def usual_size(config: ModelConfig) -> tuple[int, int]:
    """(height, width) that an image of four by three comes to a model in."""
    side = config.image_size
    return resized_size(side, side * 4 // 3, side, config.long_side, config.size_divisor)
