"""Training killed at any moment resumes as if uninterrupted; see support/kill_trials.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
TRIAL = Path(__file__).parents[1] / "support" / "kill_trials.py"


def run_trial(folder, *options, timeout=3000):
    """Run the trial in a separate process, which has not trained anything yet."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TRIAL), str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    assert done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_four_kills(tmp_path):
    report = run_trial(tmp_path, "--kills", "4", "--epochs", "1", "--workers", "2")
    assert report["faults"] == []
    assert report["kills"] == {"inside a save": 2, "at any time": 2}
    assert report["steps"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_fifty_kills(tmp_path, workers):
    report = run_trial(tmp_path, "--kills", "50", "--workers", workers)
    assert report["faults"] == []
    assert sum(report["kills"].values()) == 50
    assert report["kills"]["inside a save"] == 25


@pytest.mark.slow
def test_trial_detects_a_missing_random_state(tmp_path):
    report = run_trial(tmp_path, "--kills", "8", "--broken", "random")
    assert any("line of step" in fault for fault in report["faults"]), report
