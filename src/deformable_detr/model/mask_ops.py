"""From mask logits at stride 4 to masks of the original image.

A model with masks (`config.masks`) returns either
    mask_embeddings (B, Q, D) and mask_features (B, D, h, w), whose product are the logits (Mask DINO, section 3.2), or
    pred_masks (B, Q, h, w), the logits themselves,
on a grid that covers the padded canvas; a logit over 0 belongs to the object.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..utils.dtype import upcast
from ..utils.rle import Rle, encode_part
from ..utils.tiles import Window

MASK_OUTPUTS = ("mask_embeddings", "mask_features", "pred_masks")


@dataclass(frozen=True)
class MaskLogits:
    """The masks of k detections of one image, before they are resized to the image.

    logits: (k, h, w) float on the CPU.
    content: (height, width) of the image relative to the canvas that the grid covers, each in 0..1.
    """

    logits: Tensor
    content: tuple[float, float]

    def __getitem__(self, index: Any) -> "MaskLogits":
        return MaskLogits(self.logits[index], self.content)

    def to_rle(self, size: tuple[int, int], window: Window | None = None) -> tuple[Rle, ...]:
        """Return the masks of an image of `size` (height, width) in pixels, or of a window of it."""
        top, left, height, width = window or Window(0, 0, *size)
        parts = (self._resize(logits, (height, width)) for logits in self.logits)
        return tuple(encode_part(part.numpy(), (top + y, left + x), size) for part, (y, x) in parts)

    def _resize(self, logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Interpolate (h, w) logits bilinearly, as far as they can be positive.

        Returns the mask of this part, bool, and its top and left in an image of `size`.
        """
        window, pixels, positions = [], [], []
        for axis in (0, 1):
            cells = torch.nonzero((logits > 0).any(dim=1 - axis))[:, 0]
            if not len(cells):
                return torch.zeros(0, 0, dtype=torch.bool), (0, 0)
            count, scale = logits.shape[axis], logits.shape[axis] * self.content[axis] / size[axis]
            low, high = max(0, int(cells[0]) - 1), min(count, int(cells[-1]) + 2)
            # A pixel's center lies at this many cells: (pixel + 0.5) · scale − 0.5.
            first = max(0, math.floor((low + 0.5) / scale - 0.5) if low else 0)
            last = min(size[axis], math.ceil((high - 0.5) / scale - 0.5) + 1 if high < count else size[axis])
            window.append(slice(low, high))
            pixels.append(first)
            centers = (torch.arange(first, last, dtype=torch.float32) + 0.5) * scale - low
            positions.append(centers * 2 / (high - low) - 1)
        y, x = positions
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
        part = logits[window[0], window[1]].float()
        values = F.grid_sample(part[None, None], grid[None], padding_mode="border", align_corners=False)
        return values[0, 0] > 0, (pixels[0], pixels[1])


@dataclass(frozen=True)
class EncodedMasks:
    """The masks of k detections of one image as `MaskLogits.to_rle` returns them."""

    rles: tuple[Rle, ...]

    def __getitem__(self, index: Any) -> "EncodedMasks":
        chosen = torch.arange(len(self.rles))[index]
        return EncodedMasks(tuple(self.rles[number] for number in chosen.tolist()))

    def to_rle(self, size: tuple[int, int]) -> tuple[Rle, ...]:
        """Return the masks of the image, which is of `size` (height, width)."""
        return self.rles


def has_masks(outputs: Mapping[str, Any]) -> bool:
    """Return whether a model's outputs include masks."""
    return "pred_masks" in outputs or "mask_features" in outputs


def select_masks(outputs: Mapping[str, Any], queries: Tensor) -> Tensor:
    """Return the mask logits (B, k, h, w) of the queries (B, k), in at least fp32."""
    if "pred_masks" in outputs:
        masks = outputs["pred_masks"]
        return upcast(masks.gather(1, queries[:, :, None, None].expand(-1, -1, *masks.shape[2:])))
    embeddings, features = upcast(outputs["mask_embeddings"]), upcast(outputs["mask_features"])
    chosen = embeddings.gather(1, queries[:, :, None].expand(-1, -1, embeddings.shape[2]))
    return (chosen @ features.flatten(2)).unflatten(2, features.shape[2:])


def content_ratios(padding_mask: Tensor) -> Tensor:
    """Return the (B, 2) part of the canvas's height and width that each image covers; padding_mask: (B, H, W)."""
    valid = ~padding_mask
    return torch.stack([valid[:, :, 0].float().mean(1), valid[:, 0].float().mean(1)], dim=1)


def paste_masks(masks: Tensor, boxes: Tensor, ratios: Tensor, size: tuple[int, int]) -> Tensor:
    """Return which part in 0..1 of each cell of a grid on the canvas each object covers, (N, h, w) float.

    Args:
        masks: (N, R, R) uint8, see `structures.Target`.
        boxes: (N, 4) cxcywh in 0..1 of the images.
        ratios: (N, 2), `content_ratios` of their images.
        size: (h, w).
    """
    height, width = ratios.T
    x, y, w, h = boxes.T
    rows = _coverage(y * height, h * height, size[0], masks.shape[1])
    columns = _coverage(x * width, w * width, size[1], masks.shape[2])
    return rows @ (masks.to(rows.dtype) / 255) @ columns.transpose(1, 2)


def _coverage(center: Tensor, length: Tensor, cells: int, parts: int) -> Tensor:
    """Return which part of each of `cells` in 0..1 each of the `parts` of an interval covers: (N, cells, parts)."""
    edges = torch.arange(parts + 1, device=center.device) / parts - 0.5
    edges = (center[:, None] + length[:, None] * edges) * cells  # in cells
    first = torch.arange(cells, device=center.device)[:, None]
    return (edges[:, None] - first).clamp(0, 1).diff(dim=2)
