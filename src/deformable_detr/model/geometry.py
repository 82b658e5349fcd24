"""Positions and sizes on feature maps and boxes, shared by the network and its fused form."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .layers import inverse_sigmoid, resize_mask


def level_masks(padding_mask: Tensor, spatial_shapes: ops.Shapes) -> list[Tensor]:
    """The mask (B, H, W) at the size of each level's map."""
    return [resize_mask(padding_mask, (h, w)) for h, w in spatial_shapes]


def get_valid_ratios(masks: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Unpadded part (width, height) of each level's map in 0..1: (B, L, 2)."""
    return torch.stack([_valid_ratio(mask, dtype) for mask in masks], dim=1)


def _valid_ratio(padding_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Unpadded part (width, height) of maps, (B, H, W) mask → (B, 2) in 0..1."""
    _, H, W = padding_mask.shape
    height = (~padding_mask[:, :, 0]).sum(1).to(dtype) / H
    width = (~padding_mask[:, 0, :]).sum(1).to(dtype) / W
    return torch.stack((width, height), dim=-1)


def pixel_centers(spatial_shapes: ops.Shapes, valid_ratios: Tensor) -> Tensor:
    """Center of each token's pixel, (x, y) in 0..1 of the unpadded image (beyond 1 in the padding): (B, S, 2).

    valid_ratios: (B, L, 2), the unpadded part (width, height) of each level's map.
    """
    centers = []
    for level, (h, w) in enumerate(spatial_shapes):
        # Divided by the unpadded pixels as a whole number: proposals at exactly 1% of the image depend on it.
        width, height = (valid_ratios[:, level, :1] * w).round(), (valid_ratios[:, level, 1:] * h).round()  # (B, 1)
        y = (torch.arange(h, dtype=valid_ratios.dtype, device=valid_ratios.device) + 0.5) / height  # (B, h)
        x = (torch.arange(w, dtype=valid_ratios.dtype, device=valid_ratios.device) + 0.5) / width  # (B, w)
        grid = torch.stack((x[:, None].expand(-1, h, -1), y[:, :, None].expand(-1, -1, w)), dim=-1)
        centers.append(grid.flatten(1, 2))
    return torch.cat(centers, dim=1)


BASE_SIZE = 0.05  # side of a proposal at the finest level, relative to the image; doubles from level to level


def proposal_anchors(
    spatial_shapes: ops.Shapes, valid_ratios: Tensor, padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A box around each token, in logit space (B, S, 4), and which tokens can be proposals, (B, S).

    Tokens in the padding or within 1% of the image's border are not usable; their logits are +inf.
    """
    centers = pixel_centers(spatial_shapes, valid_ratios)  # (B, S, 2)
    sizes = [centers.new_full((h * w,), BASE_SIZE * 2**level) for level, (h, w) in enumerate(spatial_shapes)]
    boxes = torch.cat((centers, torch.cat(sizes)[None, :, None].expand(centers.shape[0], -1, 2)), dim=-1)
    usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1)
    if padding_mask is not None:
        usable = usable & ~padding_mask
    return torch.log(boxes / (1 - boxes)).masked_fill(~usable[..., None], torch.inf), usable


def refine_boxes(deltas: Tensor, reference_points: Tensor) -> Tensor:
    """Boxes (…, 4) cxcywh in 0..1 from deltas in logit space and what they start from (equation in appendix A.4).

    reference_points: (…, 2) points, to which only the center is relative, or (…, 4) boxes.
    """
    start = inverse_sigmoid(reference_points)
    if start.shape[-1] == 2:
        return torch.cat((deltas[..., :2] + start, deltas[..., 2:]), dim=-1).sigmoid()
    return (deltas + start).sigmoid()
