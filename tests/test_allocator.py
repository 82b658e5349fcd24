"""The allocator's settings save page faults, oneDNN's save memory, in a process of our own only."""

import os
import subprocess
import sys

import pytest

from deformable_detr import allocator

MEASURE = """
import resource, sys
import numpy as np
from deformable_detr.allocator import keep_large_buffers
kept = keep_large_buffers() if sys.argv[1] == "keep" else True
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
    settled = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    return {k: v for k, v in os.environ.items() if k not in settled}


def test_verbose_says_what_the_setting_does():
    said = _said("--verbose")
    assert "deformable_detr.allocator: allocator: " in said
    assert "oneDNN keeps the code of its latest 256 calls" in said
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
        assert allocator.keep_large_buffers()
        monkeypatch.setattr(Library, "mallopt", staticmethod(lambda *_: 0))
        assert not allocator.keep_large_buffers()
    assert calls == [(-3, 1 << 30), (-3, 32 << 20), (-1, 2**31 - 1)]
    assert "up to 32 MiB are kept" in caplog.text
    assert "refused" in caplog.text


KERNELS = """
import sys, torch
from deformable_detr.allocator import keep_fewer_kernels
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


EARLY = """
import os, sys
from deformable_detr import cli
found = cli.wait_shortly
def spy():
    found()
    print("torch" in sys.modules, os.environ.get("GOMP_SPINCOUNT"))
cli.wait_shortly = spy
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
