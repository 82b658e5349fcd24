"""Positions and sizes on feature maps, shared by the network and its fused form."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .layers import inverse_sigmoid

ANCHOR_SIZE = 0.05  # side of a proposal's anchor at the finest level, relative to the image; doubles per level


class FlattenedFeatures(NamedTuple):
    """The feature maps of all levels as one sequence of tokens.

    tokens: (B, S, C).
    position: (B, S, C), position encoding plus level embedding.
    padding_mask: (B, S) bool.
    spatial_shapes: (height, width) per level.
    valid_ratios: (B, L, 2), the unpadded part (width, height) of each level's map in 0..1.
    """

    tokens: Tensor
    position: Tensor
    padding_mask: Tensor
    spatial_shapes: tuple[tuple[int, int], ...]
    valid_ratios: Tensor


def get_valid_ratios(masks: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the unpadded part (width, height) of each level's mask (B, H, W): (B, L, 2) in 0..1."""
    ratios = []
    for mask in masks:
        _, H, W = mask.shape
        height = (~mask[:, :, 0]).sum(1).to(dtype) / H
        width = (~mask[:, 0, :]).sum(1).to(dtype) / W
        ratios.append(torch.stack((width, height), dim=-1))
    return torch.stack(ratios, dim=1)


def pixel_centers(spatial_shapes: ops.Shapes, valid_ratios: Tensor) -> Tensor:
    """Return each token's center (x, y) in 0..1 of the unpadded image, above 1 in the padding: (B, S, 2)."""
    centers = []
    for level, (h, w) in enumerate(spatial_shapes):
        # Rounded to whole pixels: whether a proposal at exactly 1% of the image is valid depends on it.
        width, height = (valid_ratios[:, level, :1] * w).round(), (valid_ratios[:, level, 1:] * h).round()  # (B, 1)
        y = (torch.arange(h, dtype=valid_ratios.dtype, device=valid_ratios.device) + 0.5) / height  # (B, h)
        x = (torch.arange(w, dtype=valid_ratios.dtype, device=valid_ratios.device) + 0.5) / width  # (B, w)
        grid = torch.stack((x[:, None].expand(-1, h, -1), y[:, :, None].expand(-1, -1, w)), dim=-1)
        centers.append(grid.flatten(1, 2))
    return torch.cat(centers, dim=1)


def proposal_anchors(
    spatial_shapes: ops.Shapes, valid_ratios: Tensor, padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return an anchor box per token in logit space (B, S, 4), and which tokens are valid proposals (B, S).

    Not valid are tokens in the padding, tokens within 1% of the image's border, and tokens whose anchor's side is at
    least 99% of the image's: all tokens from level index 5 on. Their anchors are +inf.
    """
    centers = pixel_centers(spatial_shapes, valid_ratios)  # (B, S, 2)
    sizes = [centers.new_full((h * w,), ANCHOR_SIZE * 2**level) for level, (h, w) in enumerate(spatial_shapes)]
    boxes = torch.cat((centers, torch.cat(sizes)[None, :, None].expand(centers.shape[0], -1, 2)), dim=-1)
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1)
    if padding_mask is not None:
        valid = valid & ~padding_mask
    return torch.log(boxes / (1 - boxes)).masked_fill(~valid[..., None], torch.inf), valid


def refine_boxes(deltas: Tensor, reference_points: Tensor, eps: float = 1e-5) -> Tensor:
    """Add deltas (…, 4) in logit space to points (…, 2) or boxes (…, 4): boxes (…, 4).

    For points, the last two deltas are the size itself (appendix A.3). Boxes are refined as in appendix A.4.
    eps: Distance that `reference_points` keep from 0 and 1.
    """
    logits = inverse_sigmoid(reference_points, eps)
    if logits.shape[-1] == 2:
        return torch.cat((deltas[..., :2] + logits, deltas[..., 2:]), dim=-1).sigmoid()
    return (deltas + logits).sigmoid()
