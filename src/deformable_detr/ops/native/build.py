"""Compile the CPU library, for the wheel's build hook or by hand in a source checkout:

    python -m deformable_detr.ops.native.build

Needs a C and a C++ compiler with GNU vectors (GCC 12 or Clang 16, or newer), but no torch, Python or OpenMP headers.
CC and CXX choose the compilers, also for another platform: CC="zig cc -target aarch64-macos". Where neither is set and
no compiler is installed, and on Windows, the package ziglang is used, which brings one.
"""

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
_SUFFIXES = {"linux": ".so", "darwin": ".dylib", "win32": ".dll"}
_SYSTEMS = {"linux": "linux", "darwin": "darwin", "macos": "darwin", "mingw": "win32", "windows": "win32"}  # in triples
_NAME = "libdeformable_attention"
LIBRARY = _NAME + _SUFFIXES.get(sys.platform, ".so")
FLAGS = ["-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
CPP_FLAGS = [*FLAGS, "-std=c++17", "-fno-exceptions", "-fno-rtti", "-ffp-contract=fast"]
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
    # GCC for Windows aligns stacks to 16 bytes, where AVX needs 32; Clang for Windows needs Visual Studio.
    for name in names if sys.platform != "win32" else ():
        if path := shutil.which(name):
            return [path]
    if importlib.util.find_spec("ziglang"):
        zig = [sys.executable, "-m", "ziglang", {"CC": "cc", "CXX": "c++"}[variable]]
        systems = {"win32": "x86_64-windows-gnu", "linux": f"{platform.machine()}-linux-gnu"}
        return [*zig, "-target", systems[sys.platform]] if sys.platform in systems else zig
    raise BuildError(f"no compiler found ({' or '.join(names)}); set {variable} to one or install the package ziglang")


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise BuildError(f"{command[0]} failed: {lines[0]}")


def _target(compiler: list[str]) -> tuple[str, str]:
    """Return the processor and the system (a `sys.platform`) that a compiler builds for."""
    try:  # zig prints the triple, and then fails if it has the version of a libc
        triple = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True, check=False).stdout.strip()
    except OSError as error:
        raise BuildError(f"cannot run {compiler[0]}: {error}") from error
    machine, _, rest = triple.partition("-")
    for word, system in _SYSTEMS.items():
        if word in rest:
            return machine, system
    raise BuildError(f"the CPU library supports Linux, macOS and Windows; {compiler[0]} builds for {triple or '?'}")


def build(folder: Path, extra_flags: tuple[str, ...] = ()) -> Path:
    """Compile the library into `folder` and return its path. Raises BuildError if that is not possible."""
    c, cpp = _compiler("CC", "gcc", "clang", "cc"), _compiler("CXX", "g++", "clang++", "c++")
    machine, system = _target(c)
    flags = [*extra_flags, *([] if system == "win32" else ["-fPIC"])]
    sets = X86_SETS if machine == "x86_64" else {"msda_base": []}
    library = folder / (_NAME + _SUFFIXES[system])
    with tempfile.TemporaryDirectory() as temporary:
        objects = []
        for name, set_flags in sets.items():
            objects.append(f"{temporary}/{name}.o")
            source = [f"-DMSDA_NS={name}", "-c", str(SOURCES / "kernels.cpp"), "-o", objects[-1]]
            _run([*cpp, *CPP_FLAGS, *set_flags, *flags, *source])
        for name in ("dispatch", "threads"):
            objects.append(f"{temporary}/{name}.o")
            _run([*c, *FLAGS, *flags, "-c", str(SOURCES / f"{name}.c"), "-o", objects[-1]])
        linked = Path(temporary, library.name)
        # Without -ffast-math, which would disable denormal numbers in the whole process.
        strip = ["-s"] if system == "linux" else []
        _run([*c, "-shared", *strip, "-o", str(linked), *objects, *extra_flags])
        folder.mkdir(parents=True, exist_ok=True)
        new = library.with_name(library.name + ".new")  # a running process may use the old file
        shutil.copyfile(linked, new)
        os.replace(new, library)
    return library


if __name__ == "__main__":
    try:
        print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCES))
    except BuildError as error:
        sys.exit(f"error: {error}")
