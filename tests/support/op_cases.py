"""Inputs for the attention op, its results with gradients, and their comparison."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deformable_detr import ops


def require(backend: str) -> None:
    missing = [b.detail for b in ops.backends() if b.name == backend and not b.available]
    if missing:
        pytest.skip(f"backend {backend}: {missing[0]}")


def case(shapes, *, B=2, Q=11, M=3, D=8, P=4, coordinates=2, seed=0, spread=2.0) -> list[Tensor]:
    """Make float64 inputs with no sample within 0.01 of a whole pixel, where location gradients jump."""
    random = torch.Generator().manual_seed(seed)
    S, L = sum(h * w for h, w in shapes), len(shapes)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64)

    reference = torch.rand(B, Q, L, coordinates, generator=random, dtype=torch.float64)
    offsets = normal(B, Q, M, L, P, 2) * spread
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    pixels = ops.sampling_locations(shapes, reference, offsets) * sizes - 0.5
    fraction = pixels - pixels.floor()
    shift = fraction.clamp(0.01, 0.99) - fraction
    scale = reference[:, :, None, :, None, 2:] * sizes * 0.5 / P if coordinates == 4 else 1.0
    offsets = torch.where(shift == 0, offsets, offsets + shift / scale)
    return [normal(B, S, M, D), reference, offsets, normal(B, Q, M, L, P)]


def results(call, inputs: list[Tensor], cotangent: Tensor | None = None) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    output = call(*leaves)
    cotangent = torch.ones_like(output) if cotangent is None else cotangent.to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]


def assert_near(actual: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    for index, (a, b) in enumerate(zip(actual, exact, strict=True)):
        assert a.shape == b.shape
        assert a.isfinite().all()
        if b.numel():
            scale = max(b.abs().max().item(), 1.0)
            assert (a.double() - b).abs().max().item() <= tolerance * scale, f"result {index}"


def fused(shapes):
    return lambda value, *rest: ops.deformable_attention(value, shapes, *rest)


def sampled(shapes):
    return lambda value, *rest: ops.sample_and_sum(value, shapes, *rest)
