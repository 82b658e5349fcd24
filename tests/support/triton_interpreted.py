"""Compare the GPU kernels on CPU tensors with float64. tests/ops/test_triton.py runs this with TRITON_INTERPRET=1."""

import itertools
import math

import torch

from deformable_detr import ops
from deformable_detr.ops import triton_backend
from deformable_detr.ops.reference import OpInputs
from tests.support.op_cases import assert_near, case


def gradients(call, inputs, cotangent):
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = call(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]


def check(shapes, coordinates, dtype, tolerance, **sizes):
    value, reference, offsets, logits = case(shapes, coordinates=coordinates or 2, **sizes)
    flat = [side for shape in shapes for side in shape]
    if coordinates:
        inputs = [value.to(dtype), reference.float(), offsets.to(dtype), logits.to(dtype)]
        exact_call = lambda v, *rest: ops.deformable_attention(v, shapes, *rest)  # noqa: E731
    else:
        locations = ops.sampling_locations(shapes, reference, offsets)
        inputs = [value.to(dtype), locations.float(), logits.to(dtype)]
        exact_call = lambda v, *rest: ops.sample_and_sum(v, shapes, *rest)  # noqa: E731
    cotangent = torch.randn(
        value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3], generator=torch.Generator().manual_seed(1)
    ).to(dtype)
    exact = gradients(exact_call, [t.double() for t in inputs], cotangent.double())
    value, *middle, offsets, logits = inputs
    reference = middle[0] if middle else None
    op_inputs = OpInputs(value, flat, reference, offsets, logits)
    output = triton_backend.forward(op_inputs)
    v, r, o, w = triton_backend.backward(cotangent, op_inputs, True)
    actual = [output, v, *([] if r is None else [r]), o, w]
    assert [t.dtype for t in actual[1:]] == [t.dtype for t in inputs]
    assert_near(actual, exact, tolerance)
    return actual


SHAPES = ((6, 9), (3, 4), (1, 1))
for coordinates, (B, Q, M, D, P) in itertools.product((0, 2, 4), ((2, 3, 2, 8, 4), (1, 3, 1, 5, 1))):
    check(SHAPES, coordinates, torch.float32, 1e-5, B=B, Q=Q, M=M, D=D, P=P)
check(SHAPES, 2, torch.float32, 1e-5, B=1, Q=67, M=1, D=32, P=4)  # encoder: reordered queries
check(SHAPES, 2, torch.bfloat16, 2e-2, B=1, Q=3, M=1, D=8, P=4, spread=0.2)
check(SHAPES, 4, torch.float16, 2e-2, B=1, Q=3, M=2, D=8, P=4)

torch.use_deterministic_algorithms(True)
first, second = (check(SHAPES, 2, torch.float32, 1e-5, B=1, Q=5, M=1, D=16, P=2, spread=0.2) for _ in range(2))
assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
torch.use_deterministic_algorithms(False)

value, reference, offsets, logits = (t.float() for t in case(SHAPES, Q=2, M=2, D=8))
bad = torch.tensor([1e30, -1e30, math.nan, math.inf, -math.inf, 3e9, -3e9, 1e5])
offsets[..., 0] = bad[torch.arange(offsets[..., 0].numel()) % 8].view_as(offsets[..., 0])
flat = [side for shape in SHAPES for side in shape]
inputs = OpInputs(value, flat, reference, offsets, logits)
output = triton_backend.forward(inputs)
results = triton_backend.backward(torch.ones_like(output), inputs, True)
for tensor in (output, *results):
    assert torch.equal(tensor, torch.zeros_like(tensor))

no_queries = OpInputs(value, flat, reference[:, :0], offsets[:, :0], logits[:, :0])
empty = triton_backend.backward(output[:, :0], no_queries, True)
assert not empty[0].any()
assert empty[1].shape == (2, 0, 3, 2)
print("passed")
