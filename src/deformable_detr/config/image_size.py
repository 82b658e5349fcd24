"""Resize rules: the size of an image to the size that the model sees. Call a rule with (height, width) in pixels."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ShortestEdge:
    """The short side becomes `short`; if the long side would exceed `long`, it becomes `long` instead.

    The aspect ratio is kept. Both sides are then rounded to the nearest positive multiple of `divisor`.
    """

    short: int
    long: int
    divisor: int = 1
    exact_ratio: bool = False  # at the limit, transformers computes the long side from the unrounded short one
    antialias: bool = True  # smooth an image that is shrunk

    def __str__(self) -> str:
        return f"resized to a short side of {self.short} and a long side of at most {self.long} pixels"

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        short, long = min(height, width), max(height, width)
        if long * self.short > self.long * short:
            new_short = max(1, round(self.long * short / long))
            ratio = self.long * short / long if self.exact_ratio else new_short
            new_long = min(self.long, max(1, int(ratio * long / short)))
            if self.exact_ratio and new_short == short:
                new_long = long
        else:
            new_short, new_long = self.short, self.short * long // short
        if self.divisor > 1:
            sides = (new_short, new_long)
            new_short, new_long = (max(1, (side + self.divisor // 2) // self.divisor) * self.divisor for side in sides)
        return (new_short, new_long) if height <= width else (new_long, new_short)


@dataclass(frozen=True)
class FixedSize:
    """Every image is stretched to `height` × `width` (RT-DETR, D-FINE, RF-DETR)."""

    height: int
    width: int
    antialias: bool = True

    @property
    def short(self) -> int:
        """Short side in pixels."""
        return min(self.height, self.width)

    def __str__(self) -> str:
        return f"stretched to {self.height}×{self.width} pixels (height × width)"

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        return self.height, self.width


@dataclass(frozen=True)
class FitInside:
    """The image becomes as large as fits into `height` × `width`; the aspect ratio is kept."""

    height: int
    width: int
    antialias: bool = True

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        scale = min(self.height / height, self.width / width)
        return max(1, min(self.height, round(height * scale))), max(1, min(self.width, round(width * scale)))


ModelResize = ShortestEdge | FixedSize  # what a config can ask for
ResizeRule = ModelResize | FitInside


def typical_input_size(rule: ResizeRule) -> tuple[int, int]:
    """Return the (height, width) of a 4:3 image after the resize."""
    return rule(480, 640)
