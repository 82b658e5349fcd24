"""GPU kernels without a GPU: interpreted results and register use after ahead-of-time compilation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deformable_detr import ops
from deformable_detr.ops import triton_backend
from tests.support.op_cases import assert_near, case, fused, results, sampled

SCRIPT = Path(__file__).parents[1] / "support" / "triton_interpreted.py"


def test_interpreted_kernels_match_float64():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "passed"


# Limits in registers per thread, with a margin over Triton 3.9.
@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize(
    ("kernel", "dtype", "registers"), [("forward", "bf16", 128), ("forward", "fp32", 160), ("backward", "bf16", 208)]
)
def test_ahead_of_time_kernels_do_not_spill_registers(kernel, dtype, registers, capability):
    pytest.importorskip("triton")
    from tests.support.triton_aot import compile_for

    usage = compile_for(kernel, capability, dtype)
    assert 0 < usage.registers <= registers
    assert usage.spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize("reference", [0, 4])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("channels", "levels", "points"), [(32, 4, 4), (64, 5, 8), (24, 3, 4), (256, 1, 1)])
def test_ahead_of_time_kernels_of_other_shapes(reference, fixed, channels, levels, points):
    pytest.importorskip("triton")
    from tests.support.triton_aot import compile_for

    for kernel in ("forward", "backward"):
        usage = compile_for(
            kernel, 90, "bf16", reference=reference, channels=channels, levels=levels, points=points, fixed=fixed
        )
        assert usage.spilled <= (64 if fixed else 0)  # 64-bit sums need a few more registers and are rarely used


def test_launch_configuration_depends_only_on_the_head_shape():
    assert triton_backend.configuration(32, 4, 4) == ({"N": 16, "DP": 32, "BQ": 2}, 1)
    assert triton_backend.configuration(5, 3, 1) == ({"N": 4, "DP": 8, "BQ": 32}, 1)
    blocks, warps = triton_backend.configuration(256, 8, 8)
    assert (blocks["BQ"], warps) == (1, 8)


def test_query_tile_order_is_a_permutation():
    order = triton_backend._order(((20, 17), (3, 5)), torch.device("cpu"))
    assert order.dtype == torch.int32
    assert torch.equal(order.sort().values, torch.arange(355, dtype=torch.int32))
    first = order[:64]
    assert set((first // 17).tolist()) == set((first % 17).tolist()) == set(range(8))


def test_backend_for_another_device_is_rejected():
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match="'triton' does not run on cpu"):
        fused(((3, 4),))(*(t.float() for t in case(((3, 4),))))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_gpu_results_match_float64(coordinates, dtype, tolerance, deterministic):
    shapes = ((20, 33), (10, 17), (5, 9))
    value, reference, offsets, logits = (t.cuda() for t in case(shapes, Q=875, M=8, D=32, coordinates=coordinates))
    inputs = [value.to(dtype), reference.float(), offsets.to(dtype), logits.to(dtype)]
    exact = results(fused(shapes), [t.double() for t in inputs])
    torch.use_deterministic_algorithms(deterministic)
    try:
        actual = results(fused(shapes), inputs)
        repeated = results(fused(shapes), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    if dtype == torch.float32:
        assert_near(actual, exact, tolerance)
    else:  # rounded offsets may hit whole pixels, where gradients jump
        assert_near([*actual[:2], actual[4]], [*exact[:2], exact[4]], tolerance)
    if deterministic:
        assert all(torch.equal(a, b) for a, b in zip(actual, repeated, strict=True))
    sampled_inputs = [inputs[0], ops.sampling_locations(shapes, inputs[1], inputs[2].float()), inputs[3].float()]
    assert_near(
        results(sampled(shapes), sampled_inputs)[:2],
        results(sampled(shapes), [t.double() for t in sampled_inputs])[:2],
        tolerance,
    )
