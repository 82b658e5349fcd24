"""Draw masks: a translucent fill and a solid outline, in a shade of the class color, with a dark rim around it.

Large masks are drawn first, and where masks overlap, the smaller one hides the larger one: colors never mix. Boxes are
thin lines behind the masks.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..utils.rle import Rle, hotcoco_rows

HALO = "#1A1A1A"
OPACITY = 110  # of the fill, 0..255
SHADES = ((0, 0.0), (255, 0.5), (0, 0.3))  # the value that each channel moves to, and how far


def shade(colors: Sequence[str], boxes: np.ndarray) -> list[str]:
    """Return lighter and darker shades of equal "#RRGGBB" colors; neighbors from left to right differ.

    The order of positions, unlike that of scores, seldom changes between the frames of a video. boxes: (N, 4) xyxy.
    """
    shades, counts = list(colors), Counter[str]()
    order: list[int] = boxes[:, [0, 2]].sum(axis=1).argsort(kind="stable").tolist()
    for index in order:
        color = colors[index]
        shades[index] = tint(color, counts[color])
        counts[color] += 1
    return shades


def tint(color: str, number: int) -> str:
    """Return one of the three shades of a "#RRGGBB" color."""
    target, share = SHADES[number % len(SHADES)]
    channels = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(value + share * (target - value)):02X}" for value in channels)


def draw_masks(
    image: Image.Image, segmentations: Sequence[Rle], boxes: np.ndarray, colors: Sequence[str], factor: int
) -> None:
    """Draw N masks and their boxes on an RGB image in place; only the region of each mask is touched.

    boxes: (N, 4) xyxy in pixels of the image, which is `factor` times as large as the masks.
    """
    import hotcoco

    rows = hotcoco_rows(segmentations)
    areas, regions = hotcoco.mask.area(rows).astype(int), hotcoco.mask.to_bbox(rows).astype(int)
    line = max(2, round(max(image.size) / 480))
    original, pen = image.copy(), ImageDraw.Draw(image)
    for box, color in zip(boxes.round().tolist(), colors, strict=True):
        pen.rectangle(box, outline=color, width=(line + 1) // 2)
    order: list[int] = np.argsort(-areas, kind="stable").tolist()
    for index in order:
        x, y, width, height = regions[index].tolist()
        mask = hotcoco.mask.decode(rows[index])[y : y + height, x : x + width].astype(bool)
        mask = mask.repeat(factor, axis=0).repeat(factor, axis=1)
        _draw_mask(image, original, (x * factor, y * factor), mask, colors[index], line)


def _draw_mask(
    image: Image.Image, original: Image.Image, corner: tuple[int, int], mask: np.ndarray, color: str, line: int
) -> None:
    """Draw a mask (h, w) bool, whose upper left pixel is `corner`, with an outline of `line` pixels inside of it."""
    mask = np.pad(mask, line)
    (x, y), (height, width) = (side - line for side in corner), mask.shape
    window = (x, y, x + width, y + height)
    alpha = np.where(_dilate(~mask, line), np.uint8(255), np.uint8(OPACITY)) * mask
    image.paste(original.crop(window), window, Image.fromarray(mask))
    image.paste(HALO, window, Image.fromarray(_dilate(mask, (line + 1) // 2) & ~mask))
    image.paste(color, window, Image.fromarray(alpha))


def _dilate(mask: np.ndarray, steps: int) -> np.ndarray:
    """Return a mask (h, w) that reaches some pixels further up, down, left and right."""
    for _ in range(steps):
        grown = mask.copy()
        grown[1:] |= mask[:-1]
        grown[:-1] |= mask[1:]
        grown[:, 1:] |= mask[:, :-1]
        grown[:, :-1] |= mask[:, 1:]
        mask = grown
    return mask
