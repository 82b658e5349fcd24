"""A training that is killed in any moment goes on as if it never was: see kill_trials.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
TRIAL = Path(__file__).parents[1] / "support" / "kill_trials.py"


def trial(folder, *options, timeout=3000):
    """What the trial found; it runs in a process of its own, which has not trained anything yet."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TRIAL), str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    assert done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_four_kills(tmp_path):
    found = trial(tmp_path, "--kills", "4", "--epochs", "1", "--workers", "2")
    assert found["faults"] == []
    assert found["kills"] == {"inside a save": 2, "at any time": 2}
    assert found["steps"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_fifty_kills(tmp_path, workers):
    found = trial(tmp_path, "--kills", "50", "--workers", workers)
    assert found["faults"] == []
    assert sum(found["kills"].values()) == 50
    assert found["kills"]["inside a save"] == 25


@pytest.mark.slow
def test_the_trial_notices_what_it_is_for(tmp_path):
    """Without the random state, a resumed run is another one."""
    found = trial(tmp_path, "--kills", "8", "--broken", "random")
    assert any("line of step" in fault for fault in found["faults"]), found
