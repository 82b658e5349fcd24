"""The CPU library compiled for other platforms by `ziglang`, and run in an emulator where the machine has one.

Debian: apt install qemu-user-static libc6-arm64-cross libgomp1-arm64-cross wine64
"""

from __future__ import annotations

import importlib.util
import math
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from deformable_detr import ops
from deformable_detr.ops.native import build
from tests.support.op_cases import assert_near, case, fused, results, sampled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="the package ziglang is not installed"),
]
ARM_SYSTEM = Path("/usr/aarch64-linux-gnu")
WINE = shutil.which("wine64") or next((p for p in ("/usr/lib/wine/wine64",) if os.path.exists(p)), None)


@dataclass
class Platform:
    target: str
    suffix: str
    magic: bytes  # first bytes of the library
    instruction_sets: tuple[str, ...] = ()
    emulator: tuple[str | None, ...] = ()
    openmp: str | None = None


PLATFORMS = {
    "linux-aarch64": Platform(
        "aarch64-linux-gnu.2.28", ".so", b"\x7fELF\x02\x01", ("neon",),
        (shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64"), "-L", str(ARM_SYSTEM)),
        str(ARM_SYSTEM / "lib" / "libgomp.so.1"),
    ),
    "windows-x86_64": Platform(
        "x86_64-windows-gnu", ".dll", b"MZ", ("base", "avx2", "avx512"), (WINE,), "vcomp140.dll"
    ),
    "macos-arm64": Platform("aarch64-macos.14.0", ".dylib", b"\xcf\xfa\xed\xfe\x0c\x00\x00\x01"),
}  # fmt: skip


@pytest.fixture(scope="module", params=PLATFORMS)
def compiled(request, tmp_path_factory):
    platform, folder = PLATFORMS[request.param], tmp_path_factory.mktemp(request.param)
    zig = [sys.executable, "-m", "ziglang"]
    with pytest.MonkeyPatch.context() as patch:
        for variable, name in (("CC", "cc"), ("CXX", "c++")):
            patch.setenv(variable, shlex.join([*zig, name, "-target", platform.target]))
        library = build.build(folder)
    driver = folder / "driver.exe"
    source = Path(__file__).with_name("native_driver.c")
    includes = ["-I", str(build.SOURCES), "-o", str(driver)]
    subprocess.run([*zig, "cc", "-target", platform.target, "-O1", str(source), *includes], check=True)
    return platform, library, driver


def test_library_is_for_its_platform(compiled):
    platform, library, _ = compiled
    assert library.suffix == platform.suffix
    assert library.read_bytes().startswith(platform.magic)


def emulate(compiled, folder: Path, call: bytes, instruction_set: str, openmp: bool) -> tuple[str, torch.Tensor]:
    """Return what the driver prints, and the results of the call as bytes."""
    platform, library, driver = compiled
    if not platform.emulator or platform.emulator[0] is None:
        pytest.skip("there is no emulator of this platform")
    (folder / "call").write_bytes(call)
    command = [*platform.emulator, str(driver), str(library), str(folder / "call"), str(folder / "result")]
    environment = {**os.environ, "MSDA_ISA": instruction_set, "WINEDEBUG": "-all", "OMP_NUM_THREADS": "4"}
    arguments = [*map(str, command), *([platform.openmp] if openmp and platform.openmp else [])]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(instruction_set), done.stdout
    return done.stdout, torch.frombuffer(bytearray((folder / "result").read_bytes()), dtype=torch.uint8)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def packed(shapes, inputs, gradient, backward: bool, plain: bool, threads: int) -> bytes:
    value, *points, offsets, _ = inputs
    B, S, M, D = value.shape
    Q, L, P = offsets.shape[1], offsets.shape[3], offsets.shape[4]
    size = points[0].shape[-1] if points else 0
    header = [B, S, Q, M, D, L, P, size, value.dtype == torch.bfloat16, threads, backward, plain]
    numbers = torch.tensor([*header, *(side for shape in shapes for side in shape)], dtype=torch.int64)
    return b"".join(raw(tensor) for tensor in (numbers, *inputs, gradient))


CASES = {
    "points": {"coordinates": 2, "D": 32, "M": 8, "Q": 50},
    "boxes": {"coordinates": 4, "D": 5, "M": 3, "Q": 9},
    "dense": {"coordinates": 2, "D": 48, "M": 2, "Q": 9 * 13 + 5 * 7},
    "weights": {"D": 16, "M": 4, "Q": 21},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_equal_the_reference(compiled, tmp_path, name, dtype):
    shapes, sizes = ((9, 13), (5, 7)), CASES[name]
    value, reference, offsets, logits = case(shapes, B=2, P=4, **{"coordinates": 2, **sizes})
    gradient = torch.randn(2, sizes["Q"], sizes["M"] * sizes["D"], generator=torch.Generator().manual_seed(1))
    value, logits, gradient = value.to(dtype), logits.to(dtype), gradient.to(dtype)
    if "coordinates" in sizes:
        inputs, function = [value, reference.float(), offsets.float(), logits], fused(shapes)
    else:
        inputs, function = [value, ops.sampling_locations(shapes, reference, offsets).float(), logits], sampled(shapes)
    exact = results(function, [t.double() for t in inputs], gradient.double())
    for instruction_set in compiled[0].instruction_sets or ("",):
        for threads, plain in ((1, False), (4, False), (4, dtype == torch.float32 and sizes["D"] % 16 == 0)):
            actual = []
            for backward in (False, True):
                call = packed(shapes, inputs, gradient, backward, plain, threads)
                printed, result = emulate(compiled, tmp_path, call, instruction_set, threads > 1)
                assert printed.split()[-1] == str(threads if threads > 1 else 0), printed
                kinds = [t.dtype for t in (inputs if backward else inputs[:1])]
                actual += split(result, exact[1:] if backward else exact[:1], kinds, sizes["M"], len(inputs) == 4)
            assert_near(actual, exact, 1e-5 if dtype == torch.float32 else 2e-2)


def split(
    result: torch.Tensor, expected: list[torch.Tensor], dtypes: list[torch.dtype], heads: int, reference: bool
) -> list[torch.Tensor]:
    """The driver's results in the order of the inputs. Gradients of reference points come last, and per head."""
    order = [0, 2, 3, 1] if reference and len(expected) > 1 else range(len(expected))
    tensors = {}
    for index in order:
        shape = list(expected[index].shape)
        per_head = len(expected) > 1 and reference and index == 1
        if per_head:
            shape.insert(1, heads)
        count = math.prod(shape) * dtypes[index].itemsize
        tensor = result[:count].view(dtypes[index]).view(shape)
        tensors[index] = tensor.sum(1) if per_head else tensor
        result = result[count:]
    assert not result.numel()
    return [tensors[index] for index in sorted(tensors)]
