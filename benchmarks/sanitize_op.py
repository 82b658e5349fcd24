"""Run the op's tests with the CPU library under AddressSanitizer and UndefinedBehaviorSanitizer.

    python benchmarks/sanitize_op.py

Tests a copy of the package with an instrumented library for each instruction set of this machine, then verifies that an
out-of-bounds read is detected. Needs GCC with libasan.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["tests/ops/test_backends.py", "tests/ops/test_operators.py"]
EXCLUDED = "opcheck or compile or export or embedding_bag or rejected"  # tests of PyTorch rather than of the library
PLUGIN = "from deformable_detr.ops.native import library\nlibrary.KEEP = 0  # fresh scratch for every call\n"
CONTROL = """
import torch
from deformable_detr.ops.native import library
from deformable_detr.ops.reference import OpInputs
compiled, _ = library.status()
value = torch.zeros(1, 1000, 2, 32)
inputs = OpInputs(value, [100, 10], None, torch.rand(1, 9, 2, 1, 4, 2), torch.rand(1, 9, 2, 1, 4))
_, call, alive = library._describe(inputs)
output = torch.empty(1, 9, 64)
call.output, short = output.data_ptr(), torch.zeros(900, 2, 32)
call.value = short.data_ptr()
for _ in range(100):
    compiled.msda_forward(call)
print("not detected")
"""


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def main() -> int:
    # AddressSanitizer looks up exceptions of libstdc++ before torch loads it.
    preload = ":".join(
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "src" / "deformable_detr", Path(folder, "deformable_detr"))
        Path(folder, "fresh_scratch.py").write_text(PLUGIN)
        sys.path.insert(0, folder)
        from deformable_detr.ops.native import build

        build.SOURCES = Path(folder, "deformable_detr", "ops", "native")
        build.build(build.SOURCES, extra_flags=("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"))
        environment = {
            **os.environ, "PYTHONPATH": folder, "LD_PRELOAD": preload, "OMP_NUM_THREADS": "2",
            "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0", "CI": "1",
        }  # fmt: skip
        failed = False
        for instruction_set in ("avx512", "avx2", "base"):
            result = run(
                [
                    "-m",
                    "pytest",
                    "-s",
                    "-x",
                    "-p",
                    "fresh_scratch",
                    "-p",
                    "no:cacheprovider",
                    "-k",
                    f"not ({EXCLUDED})",
                    *TESTS,
                ],
                {**environment, "MSDA_ISA": instruction_set},
            )
            print(f"{instruction_set}: exit {result.returncode}, {(result.stdout.strip().splitlines() or ['?'])[-1]}")
            if result.returncode:
                failed = True
                print(result.stdout[-3000:], result.stderr[-3000:])
        control = run(["-c", CONTROL], environment)
        detected = "AddressSanitizer: heap-buffer-overflow" in control.stderr
        print(f"control with a too short value tensor: {'detected' if detected else 'NOT DETECTED'}")
        return int(failed or not detected)


if __name__ == "__main__":
    sys.exit(main())
