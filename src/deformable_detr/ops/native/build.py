"""Compile the CPU library, for the wheel's build hook or by hand in a source checkout:

    python -m deformable_detr.ops.native.build

Needs a C and a C++ compiler with GNU vectors (GCC 12 or Clang 16, or newer), but no torch or Python headers. OpenMP is
compiled in but not linked: the library shares the copy, and thus the thread pool, that torch has loaded.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
LIBRARY = "libdeformable_attention.so"
FLAGS = ["-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
CPP_FLAGS = [
    *FLAGS, "-std=c++17", "-fno-exceptions", "-fno-rtti", "-fopenmp", "-ffp-contract=fast",
]  # fmt: skip
X86_SETS = {
    "msda_base": [],
    "msda_avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mtune=znver3"],
    "msda_avx512": [
        "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mbmi2", "-mprefer-vector-width=512",
    ],
}  # fmt: skip


class BuildError(Exception):
    """The library cannot be built; the message is one line."""


def _compiler(variable: str, *names: str) -> list[str]:
    if command := os.environ.get(variable):
        return shlex.split(command)
    for name in names:
        if path := shutil.which(name):
            return [path]
    raise BuildError(f"no compiler found ({' or '.join(names)}); set {variable} to one")


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise BuildError(f"{command[0]} failed: {lines[0]}")


def build(folder: Path, extra_flags: tuple[str, ...] = ()) -> Path:
    """Compile the library into `folder` and return its path. Raises BuildError if that is not possible."""
    if sys.platform != "linux":
        raise BuildError(f"the CPU library supports only Linux, not {sys.platform}")
    c, cpp = _compiler("CC", "gcc", "clang", "cc"), _compiler("CXX", "g++", "clang++", "c++")
    x86 = platform.machine() in ("x86_64", "AMD64")
    sets = X86_SETS if x86 else {"msda_base": []}
    with tempfile.TemporaryDirectory() as temporary:
        objects = []
        for name, flags in sets.items():
            objects.append(f"{temporary}/{name}.o")
            source = [f"-DMSDA_NS={name}", "-c", str(SOURCES / "kernels.cpp"), "-o", objects[-1]]
            _run([*cpp, *CPP_FLAGS, *flags, *extra_flags, *source])
        objects.append(f"{temporary}/dispatch.o")
        target = ["-DMSDA_X86"] if x86 else []
        _run([*c, *FLAGS, *target, *extra_flags, "-c", str(SOURCES / "dispatch.c"), "-o", objects[-1]])
        folder.mkdir(parents=True, exist_ok=True)
        finished = folder / (LIBRARY + ".new")
        # Without -ffast-math, which would disable denormal numbers in the whole process.
        _run([*c, "-shared", "-s", "-o", str(finished), *objects, *extra_flags, "-lm"])
        os.replace(finished, folder / LIBRARY)
    return folder / LIBRARY


if __name__ == "__main__":
    try:
        print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCES))
    except BuildError as error:
        sys.exit(f"error: {error}")
