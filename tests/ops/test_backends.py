"""Every backend compared with float64, at random shapes and edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deformable_detr import ops
from deformable_detr.ops import operators
from deformable_detr.ops.dispatch import NAMES
from deformable_detr.ops.reference import OpInputs
from tests.support.op_cases import assert_near, case, fused, require, results, sampled

CPU_BACKENDS = ("cpu", "embedding_bag")


LEVELS = st.lists(st.tuples(st.integers(1, 14), st.integers(1, 14)), min_size=1, max_size=5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shapes=LEVELS, B=st.integers(0, 3), Q=st.integers(0, 20), M=st.integers(1, 4), D=st.integers(1, 70),
    P=st.integers(1, 8), coordinates=st.sampled_from([2, 4]), dense=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_random_shapes_match_float64(backend, shapes, B, Q, M, D, P, coordinates, dense, seed):
    require(backend)
    Q = sum(h * w for h, w in shapes) if dense else Q
    inputs = case(shapes, B=B, Q=Q, M=M, D=D, P=P, coordinates=coordinates, seed=seed)
    inputs = [t.float().double() for t in inputs]
    cotangent = torch.randn(B, Q, M * D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    exact = results(fused(shapes), inputs, cotangent)
    value, reference, offsets, logits = inputs
    weights = logits.flatten(-2).softmax(-1).view_as(logits)
    sampled_inputs = [value, ops.sampling_locations(shapes, reference, offsets), weights]
    exact_sampled = results(sampled(shapes), sampled_inputs, cotangent)
    with ops.use_backend(backend):
        assert_near(results(fused(shapes), [t.float() for t in inputs], cotangent), exact, 1e-5)
        assert_near(results(sampled(shapes), [t.float() for t in sampled_inputs], cotangent), exact_sampled, 1e-5)


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [7, 300])
def test_half_precision_values(backend, dtype, queries):
    require(backend)
    shapes = ((9, 13), (5, 7))
    value, reference, offsets, logits = case(shapes, Q=queries, M=4, D=32, coordinates=4)
    inputs = [value.to(dtype), reference.float(), offsets.float(), logits.to(dtype)]
    exact = results(fused(shapes), [t.double() for t in inputs])
    with ops.use_backend(backend):
        actual = results(fused(shapes), inputs)
    assert [t.dtype for t in actual] == [dtype, *(t.dtype for t in inputs)]
    assert_near(actual, exact, 2e-2)
    assert_near(actual[2:4], exact[2:4], 1e-4)  # reference points and offsets: fp32 arithmetic throughout


def test_bf16_offsets_are_added_in_fp32():
    """Only the offsets are rounded; bf16 has too few bits for a location."""
    require("cpu")
    shapes = ((20, 100),)
    value, reference, offsets, logits = case(shapes, Q=40, D=16)
    offsets = offsets.bfloat16()
    exact = fused(shapes)(value, reference.float().double(), offsets.double(), logits.float().double())
    actual = fused(shapes)(value.float(), reference.float(), offsets, logits.float())
    assert_near([actual], [exact], 1e-5)


def test_reference_passes_gradcheck():
    shapes = ((4, 5), (3, 2))
    for coordinates in (2, 4):
        inputs = [t.requires_grad_() for t in case(shapes, B=1, Q=3, M=2, D=3, P=2, coordinates=coordinates)]
        assert torch.autograd.gradcheck(fused(shapes), inputs)


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "reference"])
@pytest.mark.parametrize("queries", [5, 60])
def test_far_and_non_finite_locations_contribute_zero(backend, queries):
    require(backend)
    shapes = ((6, 7), (1, 1))
    value, reference, offsets, logits = (t.float() for t in case(shapes, B=1, Q=queries, M=2, D=16, P=4))
    bad = torch.tensor([1e30, -1e30, math.nan, math.inf, -math.inf, 3e9, -3e9, 1e5])
    offsets[..., 0] = bad[torch.arange(offsets[..., 0].numel()) % 8].view_as(offsets[..., 0])
    with ops.use_backend(backend):
        output, by_value, *_, by_logits = results(fused(shapes), [value, reference, offsets, logits])
        locations = torch.full_like(offsets, math.nan)
        sampled_at_nan = results(sampled(shapes), [value, locations, logits])
    for tensor in (output, by_value, by_logits, sampled_at_nan[0], sampled_at_nan[1], sampled_at_nan[3]):
        assert torch.equal(tensor, torch.zeros_like(tensor))
    # Control: locations inside the map do not give zeros.
    assert results(fused(shapes), [value, reference, torch.zeros_like(offsets), logits])[0].abs().max() > 0


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_border_weights_match_float64(backend):
    require(backend)
    shapes = ((4, 6),)
    x, y = torch.meshgrid(torch.linspace(-1.2, 6.2, 38), torch.linspace(-1.2, 4.2, 28), indexing="xy")
    locations = (torch.stack([x, y], -1).view(1, -1, 1, 1, 1, 2) + 0.5) / torch.tensor([6, 4])
    value = torch.randn(1, 24, 1, 16, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(1, locations.shape[1], 1, 1, 1)
    exact = ops.sample_and_sum(value.double(), shapes, locations.double(), weights.double())
    with ops.use_backend(backend):
        assert_near([ops.sample_and_sum(value, shapes, locations, weights)], [exact], 1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_non_contiguous_inputs(backend):
    require(backend)
    shapes = ((5, 6), (3, 3))
    value, reference, offsets, logits = (t.float() for t in case(shapes, B=2, Q=9, M=2, D=16))
    views = [
        value.transpose(1, 2).contiguous().transpose(1, 2),
        reference[:, :, :1].expand_as(reference),
        offsets.movedim(2, 0).contiguous().movedim(0, 2),
        torch.cat([logits, logits], -1)[..., :4],
    ]
    assert not any(view.is_contiguous() for view in views)
    exact = results(fused(shapes), [t.double() for t in views])
    with ops.use_backend(backend):
        leaves = [t.requires_grad_() for t in views]
        output = fused(shapes)(*leaves)
        assert_near([output.detach()], exact[:1], 1e-5)
        assert_near(results(fused(shapes), leaves), exact, 1e-5)


def test_infinite_values_affect_only_queries_that_sample_them():
    require("cpu")
    shapes = ((4, 4),)
    value = torch.ones(1, 16, 1, 16)
    value[0, 0] = math.inf
    locations = torch.tensor([(0.7, 0.7), (0.1, 0.1)]).view(1, 2, 1, 1, 1, 2).repeat(1, 12, 1, 1, 1, 1)
    output = ops.sample_and_sum(value, shapes, locations, torch.ones(1, 24, 1, 1, 1))[0]
    assert torch.allclose(output[0], torch.ones(16))
    assert not output[1].isfinite().any()


def test_mismatched_shapes_are_rejected():
    shapes = ((4, 5), (2, 2))
    value, reference, offsets, logits = (t.float() for t in case(shapes))
    call = ops.deformable_attention
    with pytest.raises(ValueError, match="add up to the 24 tokens"):
        call(value, ((4, 5), (2, 3)), reference, offsets, logits)
    with pytest.raises(ValueError, match="levels"):
        call(value, shapes[:1], reference, offsets, logits)
    with pytest.raises(ValueError, match="logits of shape"):
        call(value, shapes, reference, offsets, logits[:, 1:])
    with pytest.raises(ValueError, match="reference points of shape"):
        call(value, shapes, reference[:, 1:], offsets, logits)
    with pytest.raises(ValueError, match=r"reference_points must be"):
        call(value, shapes, reference[..., :1], offsets, logits)


def test_fallback_beyond_the_limits_of_the_library():
    shapes = ((4, 5),) * 5
    many = case(shapes, Q=3, P=13, D=4)
    wide = case(shapes[:1], Q=3, D=300)
    for inputs, levels in ((many, shapes), (wide, shapes[:1])):
        exact = results(fused(levels), inputs)
        assert_near(results(fused(levels), [t.float() for t in inputs]), exact, 1e-5)


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "reference", "gather"])
@pytest.mark.parametrize("way", ["jvp", "dual"])
def test_forward_mode_tangents_match_float64(backend, way):
    """Custom operators would return zero tangents."""
    require(backend)
    shapes = ((5, 4), (3, 2))
    exact_inputs = case(shapes, Q=6, M=2, D=4, coordinates=2)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in exact_inputs]

    def tangent(inputs, tangents):
        call = fused(shapes)
        if way == "jvp":
            return torch.func.jvp(call, tuple(inputs), tuple(tangents))[1]
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(inputs, tangents, strict=True)]
            return torch.autograd.forward_ad.unpack_dual(call(*duals)).tangent

    exact = tangent([t.double() for t in exact_inputs], [t.double() for t in directions])
    step = 1e-6
    ahead, behind = (
        fused(shapes)(*(t.double() + sign * step * d.double() for t, d in zip(exact_inputs, directions, strict=True)))
        for sign in (1, -1)
    )
    torch.testing.assert_close(exact, (ahead - behind) / (2 * step), atol=1e-5, rtol=1e-4)
    with ops.use_backend(backend):
        actual = tangent([t.float() for t in exact_inputs], [t.float() for t in directions])
    assert_near([actual], [exact], 1e-4)


REFUSED = r"^(deformable attention|reference_points must|\d spatial_shapes for|spatial_shapes .* are no)"
CHANGES = ("drop", "repeat", "one", "flatten", "integers", "device")


def changed(tensor: torch.Tensor, change: str, axis: int) -> torch.Tensor:
    axis %= tensor.dim()
    if change == "drop":
        return tensor.narrow(axis, 0, tensor.shape[axis] - 1)
    if change == "repeat":
        return torch.cat([tensor, tensor], axis)
    if change == "one":  # which would broadcast
        return tensor.narrow(axis, 0, 1)
    if change == "flatten":
        return tensor.flatten(max(axis, 1) - 1, max(axis, 1))
    return tensor.long() if change == "integers" else tensor.to("meta")


@pytest.mark.parametrize("backend", NAMES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.tuples(st.integers(2, 6), st.integers(2, 6)), min_size=2, max_size=3),
    coordinates=st.sampled_from([2, 4]), which=st.integers(0, 3), change=st.sampled_from(CHANGES),
    axis=st.integers(0, 5),
)  # fmt: skip
def test_inputs_that_do_not_fit_are_refused(backend, shapes, coordinates, which, change, axis):
    inputs = [t.float() for t in case(shapes, B=2, Q=5, M=3, D=6, P=2, coordinates=coordinates)]
    value, _, offsets, logits = inputs
    if all(b.available for b in ops.backends() if b.name == backend):
        with ops.use_backend(backend):  # control: they fit before the change
            fused(shapes)(*inputs)
            sampled(shapes)(value, offsets, logits)
    sizes = change in ("drop", "repeat", "one")
    assume(not (which == 1 and coordinates == 2 and change == "repeat" and axis == 3))  # these are boxes
    inputs[which] = changed(inputs[which], change, axis % 3 if which == 0 and sizes else axis)  # any D fits
    flat = [side for shape in shapes for side in shape]
    with ops.use_backend(backend):
        with pytest.raises(ValueError, match=REFUSED):
            fused(shapes)(*inputs)
        with pytest.raises(ValueError, match=REFUSED):
            operators.check(OpInputs(inputs[0], flat, *inputs[1:]))
        if which != 1:
            with pytest.raises(ValueError, match=REFUSED):
                sampled(shapes)(inputs[0], *inputs[2:])


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(
    "shapes",
    [((4, 5),), ((4, 5), (2, 2), (1, 1)), ((4, 5), (2, 3)), ((-4, -5), (2, 2)), ((0, 5), (4, 6)), ((4.0, 5.0), (2, 2)),
     ((4, 5), (2, 2.0)), (4, 5, 2, 2), ((4, 5, 1), (2, 2)), torch.tensor([(4, 5), (2, 2)])],
)  # fmt: skip
def test_spatial_shapes_that_do_not_fit_are_refused(backend, shapes):
    value, reference, offsets, logits = (t.float() for t in case(((4, 5), (2, 2))))
    with ops.use_backend(backend):
        with pytest.raises(ValueError, match="spatial_shapes"):
            fused(shapes)(value, reference, offsets, logits)
        with pytest.raises(ValueError, match="spatial_shapes"):
            sampled(shapes)(value, offsets, logits)


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "reference", "gather"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_offsets_of_boxes_keep_the_tolerance(backend, dtype):
    """Only their own rounding counts, also for reference points in half precision."""
    require(backend)
    shapes = ((100, 167), (50, 84))
    value, reference, offsets, logits = case(shapes, B=1, Q=40, M=2, P=4, coordinates=4, spread=8.0)
    for points in (reference.float(), reference.to(dtype)):
        inputs = [value.float(), points, offsets.to(dtype), logits.float()]
        exact = fused(shapes)(*(t.double() for t in inputs))
        locations = ops.sampling_locations(shapes, points.double(), inputs[2].double()).to(dtype)
        weights = inputs[3].flatten(-2).softmax(-1).view_as(logits)
        exact_sampled = sampled(shapes)(value.float().double(), locations.double(), weights.double())
        with ops.use_backend(backend):
            assert_near([fused(shapes)(*inputs)], [exact], 1e-3)
            assert_near([sampled(shapes)(inputs[0], locations, weights)], [exact_sampled], 1e-3)
