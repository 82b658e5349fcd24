"""The op's gradients in plain PyTorch, written out because a registered op's kernel runs below autograd.

Nothing is saved by the forward pass; samples are computed again, level by level.
"""

import torch
from torch import Tensor

from .reference import OpInputs, Shapes, sampling_grid, sampling_locations

_BILINEAR, _ZEROS = 0, 0  # grid_sampler_2d's modes


def backward(
    grad_output: Tensor, inputs: OpInputs, reference_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Like `native.library.backward`."""
    value, _, reference_points, offsets, logits = inputs
    spatial_shapes = inputs.spatial_shapes
    dtypes = value.dtype, offsets.dtype, logits.dtype
    value, offsets, logits, grad_output = value.float(), offsets.float(), logits.float(), grad_output.float()
    if reference_points is None:
        grads = _sample_and_sum_backward(grad_output, value, spatial_shapes, offsets, logits)
        grad_value, grad_offsets, grad_logits = (grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))
        return grad_value, None, grad_offsets, grad_logits
    points = reference_points.float()
    weights = logits.flatten(-2).softmax(-1).view_as(logits)
    locations = sampling_locations(spatial_shapes, points, offsets)
    grad_value, grad_locations, grad_weights = _sample_and_sum_backward(
        grad_output, value, spatial_shapes, locations, weights
    )
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum((-1, -2), keepdim=True))
    grad_points, grad_offsets = _locations_backward(grad_locations, spatial_shapes, points, offsets)
    return (
        grad_value.to(dtypes[0]),
        grad_points.to(reference_points.dtype) if reference_gradient else None,
        grad_offsets.to(dtypes[1]),
        grad_logits.to(dtypes[2]),
    )


def _locations_backward(
    grad_locations: Tensor, shapes: Shapes, points: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the reference points and offsets."""
    center = grad_locations.sum((2, 4))  # (B, Q, L, 2)
    if points.shape[-1] == 2:
        sizes = torch.tensor([(w, h) for h, w in shapes], dtype=points.dtype, device=points.device)
        return center, grad_locations / sizes[:, None]
    half = 0.5 / offsets.shape[-2]
    size = (grad_locations * offsets).sum((2, 4)) * half
    return torch.cat([center, size], -1), grad_locations * (points[:, :, None, :, None, 2:] * half)


def _sample_and_sum_backward(
    grad_output: Tensor, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, contiguous."""
    B, _, M, D = value.shape
    Q, P = locations.shape[1], locations.shape[4]
    grad = grad_output.view(B, Q, M, D).permute(0, 2, 3, 1).reshape(B * M, D, Q, 1)
    grad_value, grad_locations, grad_weights = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (value, locations, weights)
    )
    start = 0
    for level, (h, w) in enumerate(shapes):
        pixels = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(B * M, D, h, w)
        grid = sampling_grid(locations[:, :, :, level]).transpose(1, 2).reshape(B * M, Q, P, 2)
        weight = weights[:, :, :, level].transpose(1, 2).reshape(B * M, 1, Q, P)
        samples = torch.grid_sampler_2d(pixels, grid, _BILINEAR, _ZEROS, False)
        grad_pixels, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
            grad * weight, pixels, grid, _BILINEAR, _ZEROS, False, (True, True)
        )
        grad_value[:, start : start + h * w] = grad_pixels.view(B, M, D, h * w).permute(0, 3, 1, 2)
        grad_locations[:, :, :, level] = 2 * grad_grid.view(B, M, Q, P, 2).transpose(1, 2)
        grad_weights[:, :, :, level] = (samples * grad).sum(1).view(B, M, Q, P).transpose(1, 2)
        start += h * w
    return grad_value, grad_locations, grad_weights
