"""The allocator's settings save page faults, oneDNN's save memory, in a process of our own only."""

import ctypes
import os
import subprocess
import sys

import pytest

from deformable_detr.utils import process as allocator

MEASURE = """
import resource, sys
import numpy as np
from deformable_detr.utils.process import retain_freed_memory
kept = retain_freed_memory() if sys.argv[1] == "keep" else True
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(20_000_000)
before = faults()
for _ in range(5):
    np.ones(20_000_000)  # 160 MB, given back each time
print(int(kept), faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_large_buffers_are_kept():
    found = {}
    for how in ("keep", "leave"):
        kept, faults = subprocess.check_output([sys.executable, "-c", MEASURE, how], text=True).split()
        if kept == "0":
            pytest.skip("no glibc here")
        found[how] = int(faults)
    assert found["keep"] < found["leave"] / 10


def _said(*options):
    """What a command logs; the command itself is refused."""
    command = [sys.executable, "-m", "deformable_detr", "predict", "nothing", "no.jpg", *options]
    return subprocess.run(command, capture_output=True, text=True, env=_unsettled()).stderr


def _unsettled():
    """The environment without what would settle our commands' settings."""
    settled = {
        "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY",
        "GLIBC_TUNABLES", allocator._BEGUN,
    }  # fmt: skip
    return {k: v for k, v in os.environ.items() if k not in settled}


def test_verbose_says_what_the_setting_does():
    said = _said("--verbose")
    assert "deformable_detr.utils.process: allocator: " in said
    assert not allocator._is_glibc() or "(GLIBC_TUNABLES: glibc.malloc.tcache_count=0)" in said
    assert "oneDNN keeps the code of its latest 256 calls" in said
    assert "PyTorch keeps the code of its latest 256 calls" in said
    assert "waiting threads look 10000 times" in said
    assert "error: no.jpg: no such image" in said  # the option is nobody else's
    assert "allocator" not in _said()


def test_older_glibc_takes_less(monkeypatch, caplog):
    calls = []

    class Library:
        @staticmethod
        def mallopt(option, value):
            calls.append((option, value))
            return option != -3 or value <= 32 << 20

    monkeypatch.setattr("ctypes.CDLL", lambda _: Library)
    monkeypatch.setattr("sys.platform", "linux")
    with caplog.at_level("INFO", "deformable_detr"):
        assert allocator.retain_freed_memory()
        monkeypatch.setattr(Library, "mallopt", staticmethod(lambda *_: 0))
        assert not allocator.retain_freed_memory()
    assert calls == [(-3, 1 << 30), (-3, 32 << 20), (-1, 2**31 - 1), (1, 0)]
    assert "up to 32 MiB are kept" in caplog.text
    assert "refused" in caplog.text


BEGUN = """
import os, sys
print("begun", end=" ", flush=True)
sys.executable = os.environ.get("INTERPRETER", sys.executable)
from deformable_detr import cli
cli.main = lambda: print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], sys.flags.dev_mode)
from deformable_detr.__main__ import run
run()
"""


def begun(*words, **settings):
    """How often a program begins that begins as our commands do, with the process number it was started with, and what
    it sees: its GLIBC_TUNABLES, its words and whether its interpreter has the option it was given."""
    command = [sys.executable, "-X", "dev", "-c", BEGUN, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**_unsettled(), **settings}) as process:
        said = process.communicate()[0].strip()
    assert f" {process.pid} " in said
    return said.count("begun"), said.split(f" {process.pid} ")[1]


@pytest.mark.skipif(not allocator._is_glibc(), reason="glibc only")
def test_commands_begin_without_thread_caches():
    off = "glibc.malloc.tcache_count=0"
    words = ["predict", "a folder", "--verbose", "ä", "*"]
    assert begun(*words) == (2, f"{off} {words} True")
    assert begun("benchmark", "predict") == (2, f"{off} ['benchmark', 'predict'] True")
    assert begun("--verbose", "benchmark", "model") == (1, "None ['--verbose', 'benchmark', 'model'] True")
    other = "glibc.malloc.perturb=0"
    assert begun("train", GLIBC_TUNABLES=other) == (2, f"{other}:{off} ['train'] True")
    chosen = "glibc.malloc.tcache_count=3"
    assert begun("train", GLIBC_TUNABLES=chosen) == (1, f"{chosen} ['train'] True")


@pytest.mark.skipif(not allocator._is_glibc(), reason="glibc only")
def test_commands_begin_anew_once_only(tmp_path):
    forgetful = tmp_path / "python"
    forgetful.write_text(f'#!/bin/sh\nunset GLIBC_TUNABLES\nexec {sys.executable} "$@"\n')
    forgetful.chmod(0o755)
    assert begun("train", INTERPRETER=str(forgetful)) == (2, "None ['train'] True")


def test_commands_begin_where_they_cannot_begin_anew(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(allocator, "_is_glibc", lambda: True)
    monkeypatch.setattr(os, "execv", lambda *_: (_ for _ in ()).throw(PermissionError()))
    allocator.begin_without_thread_caches()
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.tcache_count=0"
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(allocator, "_is_glibc", lambda: False)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("begun anew"))
    allocator.begin_without_thread_caches()
    assert not os.environ


# For the programs below: what glibc tells of its heap, in the order of malloc.h.
INFORMATION = """
import ctypes
library = ctypes.CDLL(None)
class Information(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", *"abcdef", "uordblks", "g", "h")]
library.mallinfo2.restype = Information
"""

HOLES = f"""{INFORMATION}
import torch
from deformable_detr.utils.process import retain_freed_memory
retain_freed_memory()
library.malloc.restype = ctypes.c_void_p
heap = []
for turn in range(40):
    buffers = [torch.empty((8 << 20) + 4096 * turn + 1000 * i, dtype=torch.uint8) for i in range(6)]
    del buffers
    kept = [library.malloc(size) for size in range(24, 120, 8)]
    heap.append(library.mallinfo2().arena >> 20)
print(heap[-1] - heap[0])
"""


told_by_glibc = pytest.mark.skipif(
    not (allocator._is_glibc() and hasattr(ctypes.CDLL(None), "mallinfo2")), reason="glibc 2.33 and newer only"
)


@told_by_glibc
@pytest.mark.parametrize("count", ["0", "7"])
def test_buffers_leave_no_holes_without_thread_caches(count):
    environment = {**_unsettled(), "GLIBC_TUNABLES": f"glibc.malloc.tcache_count={count}"}
    grown = subprocess.check_output([sys.executable, "-c", HOLES], text=True, env=environment)
    assert (int(grown) < 50) == (count == "0")  # MiB; six buffers of 8 at a time


FORKED = """
import sys
import torch
from deformable_detr import allocator
from deformable_detr.benchmark.machine import resident_mib
from deformable_detr.data import batching
if not allocator.retain_freed_memory():
    print("no glibc")
    sys.exit()
if sys.argv[1] == "as it is":
    batching.give_back = lambda: None

class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, key):
        from deformable_detr.structures import Target
        nothing = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), 0, (8, 8))
        return torch.zeros(3, 8, 8, dtype=torch.uint8), nothing

sizes = []
loader = batching.loader(Images(), 2, workers=1, shuffle=False, seed=0)
for _ in range(2):
    buffers = [torch.ones(20 << 20) for _ in range(5)]
    last = torch.ones(1000)  # above them: without it, all would be the heap's end, which any free gives back
    del buffers
    before = resident_mib()
    for _ in loader:
        pass
    sizes.append(before - resident_mib())
print(*map(int, sizes))
del loader  # or the end of the program waits for its workers, which bear to be told to end for a minute
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
@pytest.mark.parametrize("how", ["given back", "as it is"])
def test_free_memory_goes_back_before_workers_are_forked(how):
    told = subprocess.run([sys.executable, "-c", FORKED, how], capture_output=True, text=True)
    if told.stdout.startswith("no glibc"):
        pytest.skip("no glibc here")
    assert told.returncode == 0, told.stderr
    first, second = map(int, told.stdout.split())
    assert (first > 300) == (how == "given back")
    assert second < 100  # the workers are there already: nothing is forked


KERNELS = """
import sys, torch
from deformable_detr.utils.process import keep_fewer_kernels
torch.set_num_threads(1)
if sys.argv[1] == "fewer":
    keep_fewer_kernels()
weight = torch.ones(4, 16, 3, 3)
for side in (*range(90, 390), 90):
    torch.nn.functional.conv2d(torch.ones(1, 16, 16, side), weight)
"""


def kernels(how, **settings):
    """Whether the kernel of the first of 300 sizes was made anew at the end."""
    environment = {**os.environ, "ONEDNN_VERBOSE": "profile_create", **settings}
    environment = {key: value for key, value in environment.items() if value}
    said = subprocess.check_output([sys.executable, "-c", KERNELS, how], text=True, env=environment)
    made = [line for line in said.splitlines() if "create" in line and "convolution" in line]
    if not made:
        pytest.skip("this PyTorch does not compute by oneDNN, or does not say so")
    return "cache_miss" in made[-1]


def test_fewer_kernels_are_kept():
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    assert kernels("fewer", **{name: ""})
    assert not kernels("as they come", **{name: ""})
    assert not kernels("fewer", **{name: "1000"})  # who says how many decides


COPIES = f"""{INFORMATION}
import torch
from deformable_detr.utils.process import keep_fewer_kernels
keep_fewer_kernels()
weight = torch.ones(16, 16, 3, 3)
for side in range(20, 620):
    if side in (320, 619):
        print(library.mallinfo2().uordblks >> 10)
    torch.nn.functional.conv2d(torch.ones(1, 16, 20, side), weight)
"""


@told_by_glibc
@pytest.mark.parametrize("kept", ["", "1000"])
def test_fewer_copies_of_kernels_are_kept(kept):
    settings = {"LRU_CACHE_CAPACITY": kept} if kept else {}
    said = subprocess.check_output([sys.executable, "-c", COPIES], text=True, env={**_unsettled(), **settings})
    before, after = map(int, said.split())
    assert (after - before < 1000) == (kept == "")  # KiB, in which 300 sizes came


EARLY = """
import os, sys
from deformable_detr import cli
found = cli.shorten_omp_spin
def spy():
    found()
    print("torch" in sys.modules, os.environ.get("GOMP_SPINCOUNT"))
cli.shorten_omp_spin = spy
cli.main(["predict", "nothing", "no.jpg"])
"""


@pytest.mark.parametrize(
    ("given", "seen"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
    ids=["nothing said", "how often", "a policy"],
)
def test_waiting_is_settled_before_torch_and_by_the_user(given, seen):
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True, env={**_unsettled(), **given})
    assert done.stdout.split() == ["False", seen]
