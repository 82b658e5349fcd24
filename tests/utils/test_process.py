"""Allocator, oneDNN and OpenMP settings, each tested in a separate process."""

import ctypes
import os
import subprocess
import sys

import pytest

from deformable_detr.utils import process

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
VARIABLES = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"}


def environment(**settings):
    """Return the environment with these settings and without the variables that override ours."""
    return {key: value for key, value in os.environ.items() if key not in VARIABLES} | settings


def run(program, *arguments, **settings):
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.check_output(command, text=True, env=environment(**settings))


PAGE_FAULTS = """
import resource, sys
import numpy as np
from deformable_detr.utils.process import retain_freed_memory
retained = retain_freed_memory() if sys.argv[1] == "retain" else True
def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(20_000_000)
before = page_faults()
for _ in range(5):
    np.ones(20_000_000)  # 160 MB, freed each time
print(int(retained), page_faults() - before)
"""


@LINUX
def test_retained_memory_saves_page_faults():
    faults = {}
    for mode in ("retain", "default"):
        retained, faults[mode] = map(int, run(PAGE_FAULTS, mode).split())
        if not retained:
            pytest.skip("no glibc")
    assert faults["retain"] < faults["default"] / 10


def test_verbose_logs_each_setting():
    def log(*options):
        command = [sys.executable, "-m", "deformable_detr", "predict", "nothing", "no.jpg", *options]
        return subprocess.run(command, capture_output=True, text=True, env=environment()).stderr

    lines = log("--verbose")
    assert "deformable_detr.utils.process: allocator: " in lines
    assert "oneDNN caches 256 primitives" in lines
    assert "PyTorch caches 256 primitives" in lines
    assert "threads spin 10000 times" in lines
    assert "error: no.jpg: no such image" in lines  # --verbose does not reach the command
    assert "allocator" not in log()


def test_older_glibc_accepts_a_lower_threshold(monkeypatch, caplog):
    calls = []

    class Library:
        @staticmethod
        def mallopt(option, value):
            calls.append((option, value))
            return option != -3 or value <= 32 << 20

    monkeypatch.setattr("ctypes.CDLL", lambda _: Library)
    monkeypatch.setattr("sys.platform", "linux")
    with caplog.at_level("INFO", "deformable_detr"):
        assert process.retain_freed_memory()
        monkeypatch.setattr(Library, "mallopt", staticmethod(lambda *_: 0))
        assert not process.retain_freed_memory()
    assert calls == [(-3, 1 << 30), (-3, 32 << 20), (-1, 2**31 - 1)]
    assert "freed buffers up to 32 MiB" in caplog.text
    assert "refused" in caplog.text


FORKED = """
import sys
import torch
from deformable_detr.benchmark import resident_mib
from deformable_detr.data import dataloader
from deformable_detr.utils.process import retain_freed_memory
if not retain_freed_memory():
    print("no glibc")
    sys.exit()
if sys.argv[1] == "untrimmed":
    dataloader.malloc_trim = lambda: None

class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, key):
        from deformable_detr.structures import Target
        target = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), 0, (8, 8))
        return torch.zeros(3, 8, 8, dtype=torch.uint8), target

freed = []
loader = dataloader.build_dataloader(Images(), dataloader.LoaderOptions(2, num_workers=1))
for _ in range(2):
    buffers = [torch.ones(20 << 20) for _ in range(5)]
    last = torch.ones(1000)  # keeps the buffers from the end of the heap, which any free() returns
    del buffers
    before = resident_mib()
    for _ in loader:
        pass
    freed.append(before - resident_mib())
print(*map(int, freed))
del loader  # stops the workers, which would delay the exit by a minute
"""


@LINUX
@pytest.mark.parametrize("mode", ["trimmed", "untrimmed"])
def test_free_memory_is_trimmed_before_workers_are_forked(mode):
    output = run(FORKED, mode)
    if output.startswith("no glibc"):
        pytest.skip("no glibc")
    first, second = map(int, output.split())
    assert (first > 300) == (mode == "trimmed")
    assert second < 100  # the workers already exist, so nothing is forked


PRIMITIVES = """
import sys, torch
from deformable_detr.utils.process import limit_primitive_caches
torch.set_num_threads(1)
if sys.argv[1] == "limit":
    limit_primitive_caches()
weight = torch.ones(4, 16, 3, 3)
for side in (*range(90, 390), 90):
    torch.nn.functional.conv2d(torch.ones(1, 16, 16, side), weight)
"""


@pytest.mark.parametrize(
    ("mode", "settings", "evicted"),
    [
        ("limit", {}, True),
        ("default", {}, False),
        ("limit", {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1000"}, False),  # the environment takes precedence
    ],
)
def test_onednn_caches_fewer_primitives(mode, settings, evicted):
    lines = run(PRIMITIVES, mode, ONEDNN_VERBOSE="profile_create", **settings).splitlines()
    created = [line for line in lines if "create" in line and "convolution" in line]
    if not created:
        pytest.skip("this PyTorch does not use oneDNN, or does not log it")
    assert ("cache_miss" in created[-1]) == evicted  # the first of 300 sizes, repeated


HEAP = """
import ctypes
import torch
from deformable_detr.utils.process import limit_primitive_caches
library = ctypes.CDLL(None)
class Mallinfo(ctypes.Structure):  # the fields of mallinfo2 in malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", *"abcdef", "uordblks", "g", "h")]
library.mallinfo2.restype = Mallinfo
limit_primitive_caches()
weight = torch.ones(16, 16, 3, 3)
for side in range(20, 620):
    if side in (320, 619):
        print(library.mallinfo2().uordblks >> 10)
    torch.nn.functional.conv2d(torch.ones(1, 16, 20, side), weight)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 or newer"
)
@pytest.mark.parametrize("capacity", ["", "1000"])
def test_pytorch_caches_fewer_primitives(capacity):
    settings = {"LRU_CACHE_CAPACITY": capacity} if capacity else {}
    before, after = map(int, run(HEAP, **settings).split())
    assert (after - before < 1000) == (capacity == "")  # KiB for 300 more sizes


EARLY = """
import os, sys
from deformable_detr import cli
module = sys.modules["deformable_detr.cli.app"]
original = module.shorten_omp_spin
def spy():
    original()
    print("torch" in sys.modules, os.environ.get("GOMP_SPINCOUNT"))
module.shorten_omp_spin = spy
cli.main(["predict", "nothing", "no.jpg"])
"""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
    ids=["default", "spin count", "wait policy"],
)
def test_spinning_is_set_before_torch_is_imported(settings, expected):
    command = [sys.executable, "-c", EARLY]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(**settings))
    assert result.stdout.split() == ["False", expected]
