"""Compile the GPU kernels for absent GPUs and read their register usage.

python -m tests.support.triton_aot      # registers and spills for compute capability 7.5, 8.0 and 9.0
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from deformable_detr.ops.triton_backend import configuration

CAPABILITIES = (75, 80, 90)


@dataclass(frozen=True)
class Usage:
    """Registers and spilled bytes per thread."""

    kernel: str
    capability: int
    dtype: str
    registers: int
    spilled: int


def compile_for(
    kernel: str, capability: int, dtype: str, *, reference: int = 2, channels: int = 32, levels: int = 4,
    points: int = 4, fixed: bool = False,
) -> Usage:  # fmt: skip
    """Compile a kernel.

    kernel: "forward" or "backward". dtype: "fp32", "fp16" or "bf16". reference: 2 for points, 4 for boxes, 0 for none.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from deformable_detr.ops import triton_kernels

    function = getattr(triton_kernels, kernel)
    blocks, warps = configuration(channels, levels, points, fixed)
    constants = {
        "M": 8, "D": channels, "L": levels, "P": points, "REF": reference, "ORDERED": True, "FIXED": fixed, **blocks,
    }  # fmt: skip
    types = {"reference": "fp32", "order": "i32", "geometry": "i32", "scale": "fp32"}
    types["grad_value"] = "i64" if fixed else "fp32"
    if not reference:
        types["offsets"] = "fp32"
    signature, attributes, constexprs = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], constexprs[name] = "constexpr", constants[name]
        elif name in ("Q", "S"):
            signature[name] = "i32"
        else:
            signature[name] = "*" + types.get(name, dtype)
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
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
    match = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if match is None:
        raise ValueError(f"cuobjdump reports no registers: {text!r}")
    registers, stack, local = map(int, match.groups())
    return registers, stack + local


if __name__ == "__main__":
    for capability in CAPABILITIES:
        for dtype in ("fp32", "fp16", "bf16"):
            for kernel in ("forward", "backward"):
                print(compile_for(kernel, capability, dtype))
