"""The allocator's settings save page faults, in a process of our own only."""

import subprocess
import sys

import pytest

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
