"""Compiles the GPU kernels for cards that are not here, and reads what they take of them.

python -m deformable_detr.ops.triton_aot      # registers and spills for compute capability 7.5, 8.0 and 9.0
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .triton_backend import configuration

CAPABILITIES = (75, 80, 90)


@dataclass(frozen=True)
class Usage:
    """Of one thread: registers, and bytes of memory where they did not suffice."""

    kernel: str
    capability: int
    dtype: str
    registers: int
    spilled: int


def compile_for(
    kernel: str, capability: int, dtype: str, *, reference: int = 2, channels: int = 32, levels: int = 4,
    points: int = 4, fixed: bool = False,
) -> Usage:  # fmt: skip
    """kernel: "forward" or "backward"; dtype: "fp32", "fp16" or "bf16"; reference: coordinates of a point (0: none)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import triton_kernels

    function = getattr(triton_kernels, kernel)
    blocks, warps = configuration(channels, levels, points, fixed)
    constants = {
        "M": 8, "D": channels, "L": levels, "P": points, "REF": reference, "ORDERED": True, "FIXED": fixed, **blocks,
    }  # fmt: skip
    types = {"reference": "fp32", "order": "i32", "geometry": "i32", "scale": "fp32"}
    types["grad_value"] = "i64" if fixed else "fp32"
    if not reference:
        types["offsets"] = "fp32"
    signature, attributes, given = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], given[name] = "constexpr", constants[name]
        elif name in ("Q", "S"):
            signature[name] = "i32"
        else:
            signature[name] = "*" + types.get(name, dtype)
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=given, attrs=attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "enable_fp_fusion": True}
    )
    return Usage(kernel, capability, dtype, *_resources(compiled.asm["cubin"]))


def _resources(binary: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump says nothing of registers: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


if __name__ == "__main__":
    for capability in CAPABILITIES:
        for dtype in ("fp32", "fp16", "bf16"):
            for kernel in ("forward", "backward"):
                print(compile_for(kernel, capability, dtype))
