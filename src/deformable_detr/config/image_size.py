"""Image size after the resize."""

from .schema import ModelConfig


def resized_size(height: int, width: int, image_size: int, long_side: int, size_divisor: int = 1) -> tuple[int, int]:
    """Return the (height, width) of an image after `data.transforms.resize`.

    The short side becomes `image_size`; if the long side would exceed `long_side`, it becomes `long_side` instead.
    The aspect ratio is kept. Both sides are then rounded to the nearest positive multiple of `size_divisor`.
    """
    short, long = min(height, width), max(height, width)
    if long * image_size > long_side * short:
        new_short = max(1, round(long_side * short / long))
        new_long = min(long_side, max(1, new_short * long // short))
    else:
        new_short, new_long = image_size, image_size * long // short
    if size_divisor > 1:
        sides = (new_short, new_long)
        new_short, new_long = (max(1, (side + size_divisor // 2) // size_divisor) * size_divisor for side in sides)
    return (new_short, new_long) if height <= width else (new_long, new_short)


def typical_input_size(config: ModelConfig) -> tuple[int, int]:
    """Return the (height, width) of a 4:3 image after the resize."""
    side = config.image_size
    return resized_size(side, side * 4 // 3, side, config.long_side, config.size_divisor)
