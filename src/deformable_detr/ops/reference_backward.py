"""Gradients of the op in plain PyTorch, written out: a registered op's kernel runs below autograd and cannot ask it.

Nothing is kept from the forward pass; each level's samples are computed again, one level at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import Shapes, sampling_grid, sampling_locations

_BILINEAR, _ZEROS = 0, 0  # grid_sample's modes


def backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: list[int],
    reference: Tensor | None,
    offsets: Tensor,
    logits: Tensor,
    reference_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """As `native.library.backward`: gradients of value, reference (None unless asked for), offsets, logits."""
    spatial_shapes = tuple(zip(shapes[::2], shapes[1::2], strict=True))
    dtypes = value.dtype, offsets.dtype, logits.dtype
    value, offsets, logits, grad_output = value.float(), offsets.float(), logits.float(), grad_output.float()
    if reference is None:
        results = _sampled(grad_output, value, spatial_shapes, offsets, logits)
        by_value, by_offsets, by_logits = (r.to(dtype) for r, dtype in zip(results, dtypes, strict=True))
        return by_value, None, by_offsets, by_logits
    points = reference.float()
    weights = logits.flatten(-2).softmax(-1).view_as(logits)
    locations = sampling_locations(spatial_shapes, points, offsets)
    by_value, by_locations, by_weights = _sampled(grad_output, value, spatial_shapes, locations, weights)
    by_logits = weights * (by_weights - (weights * by_weights).sum((-1, -2), keepdim=True))
    by_points, by_offsets = _located(by_locations, spatial_shapes, points, offsets)
    return (
        by_value.to(dtypes[0]),
        by_points.to(reference.dtype) if reference_gradient else None,
        by_offsets.to(dtypes[1]),
        by_logits.to(dtypes[2]),
    )


def _located(by_locations: Tensor, shapes: Shapes, points: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Through `sampling_locations`: gradients of the reference points and of the offsets, contiguous."""
    center = by_locations.sum((2, 4))  # (B, Q, L, 2)
    if points.shape[-1] == 2:
        sizes = torch.tensor([(w, h) for h, w in shapes], dtype=points.dtype, device=points.device)
        return center, by_locations / sizes[:, None]
    half = 0.5 / offsets.shape[-2]
    size = (by_locations * offsets).sum((2, 4)) * half
    return torch.cat([center, size], -1), by_locations * (points[:, :, None, :, None, 2:] * half)


def _sampled(
    grad_output: Tensor, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Through `sample_and_sum`: gradients of value, locations and weights, contiguous."""
    B, _, M, D = value.shape
    Q, P = locations.shape[1], locations.shape[4]
    grad = grad_output.view(B, Q, M, D).permute(0, 2, 3, 1).reshape(B * M, D, Q, 1)
    by_value, by_locations, by_weights = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in
                                          (value, locations, weights))  # fmt: skip
    start = 0
    for level, (h, w) in enumerate(shapes):
        pixels = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(B * M, D, h, w)
        grid = sampling_grid(locations[:, :, :, level]).transpose(1, 2).reshape(B * M, Q, P, 2)
        weight = weights[:, :, :, level].transpose(1, 2).reshape(B * M, 1, Q, P)
        samples = torch.grid_sampler_2d(pixels, grid, _BILINEAR, _ZEROS, False)
        by_pixels, by_grid = torch.ops.aten.grid_sampler_2d_backward(
            grad * weight, pixels, grid, _BILINEAR, _ZEROS, False, (True, True)
        )
        by_value[:, start : start + h * w] = by_pixels.view(B, M, D, h * w).permute(0, 3, 1, 2)
        by_locations[:, :, :, level] = 2 * by_grid.view(B, M, Q, P, 2).transpose(1, 2)
        by_weights[:, :, :, level] = (samples * grad).sum(1).view(B, M, Q, P).transpose(1, 2)
        start += h * w
    return by_value, by_locations, by_weights
