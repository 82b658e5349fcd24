"""The CPU library shares the threads of the OpenMP runtime that torch has loaded."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deformable_detr.ops.native import library, openmp
from tests.support.op_cases import case, fused, require, results

SHAPES = ((30, 30), (15, 15))
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
RUN = """
import re, sys, torch
from pathlib import Path
torch.set_num_threads(3)
torch.rand(4096, 4096).sin()
def tasks(): return len(list(Path("/proc/self/task").iterdir()))
before = tasks()
from deformable_detr import ops
x = torch.randn(1, 1125, 8, 32, requires_grad=True)
def call():
    out = ops.deformable_attention(x, ((30, 30), (15, 15)), torch.rand(1, 900, 2, 2), torch.randn(1, 900, 8, 2, 4, 2),
                                   torch.randn(1, 900, 8, 2, 4))
    out.sum().backward()
call()
first = tasks()
for _ in range(5): call()
files = {Path(line.split()[-1]).name for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
runtimes = sorted(name for name in files if re.match(r"lib(gomp|iomp5|omp)[-.]", name))
print(ops.backends()[0].detail, "|", before, first, tasks(), "|", *runtimes)
"""


@linux
def test_one_runtime_and_one_pool():
    require("cpu")
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True)
    detail, counts, runtimes = done.stdout.strip().split("|")
    before, first, last = map(int, counts.split())
    assert "PyTorch's threads" in detail
    assert len(runtimes.split()) == 1, runtimes
    # autograd's thread is new, and it has a team of its own: 1 + 2 threads, as for torch's own gradients
    assert first - before <= 3
    assert last == first


def test_all_threads_take_part():
    """Count the calls of the work function in a parallel region of the library."""
    require("cpu")
    compiled, _ = library.status()
    fork, set_threads = openmp.entry_points()
    if set_threads is not None:
        pytest.skip("the function of Windows takes other arguments")
    fork_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    asked = []

    @fork_type
    def observed(work, data, threads, flags):
        asked.append(threads)
        fork_type(fork)(work, data, threads, flags)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    compiled.msda_use_openmp(ctypes.cast(observed, ctypes.c_void_p), None)
    try:
        fused(SHAPES)(*[t.float() for t in case(SHAPES, Q=1125)])
    finally:
        compiled.msda_use_openmp(fork, set_threads)
        torch.set_num_threads(before)
    assert asked
    assert set(asked) == {3}


@linux
def test_runtime_outside_the_global_names_is_found(monkeypatch):
    """As in PyTorch's wheel for aarch64, whose libtorch_global_deps does not name its libgomp."""

    class Nothing:
        pass

    original = ctypes.CDLL
    monkeypatch.setattr(
        ctypes, "CDLL", lambda name, **options: Nothing() if name is None else original(name, **options)
    )
    assert openmp.entry_points() is not None
    monkeypatch.setattr(openmp, "_loaded", lambda name: iter(()))
    assert openmp.entry_points() is None


def test_without_a_runtime_one_thread_works_and_is_announced(monkeypatch, caplog):
    require("cpu")
    inputs = [t.float() for t in case(SHAPES, Q=1125)]
    expected = results(fused(SHAPES), inputs)
    fork, set_threads = openmp.entry_points()
    monkeypatch.setattr(openmp, "entry_points", lambda: None)
    library.status.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "deformable_detr.ops"):
            compiled, detail = library.status()
            library.status()
        compiled.msda_use_openmp(None, None)
        actual = results(fused(SHAPES), inputs)
    finally:
        compiled.msda_use_openmp(fork, set_threads)
        library.status.cache_clear()
    assert detail.endswith("one thread")
    assert sum("one thread" in record.getMessage() for record in caplog.records) == 1
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_library_links_to_no_openmp():
    require("cpu")
    data = Path(library.SOURCES / library.LIBRARY).read_bytes()
    assert not [name for name in (b"libgomp", b"libiomp", b"libomp", b"GOMP_", b"__kmpc") if name in data]
