"""Runs under torchrun: a restart after a killed process, and SIGTERM."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deformable_detr.detector import DeformableDETR
from deformable_detr.training.checkpoint import load_checkpoint
from tests.support.distributed_jobs import run_config
from tests.support.processes import free_ports
from tests.support.training import write_dataset

ROOT = Path(__file__).parents[2]
LIMIT = 600  # seconds; a run takes about 20 on an idle machine
EPOCHS = 20  # of two steps each


class Torchrun:
    """`torchrun … -m deformable_detr train` in two processes; a timeout fails the test."""

    def __init__(self, folder, *options, limit: float = LIMIT, resume=False):
        self.out, self.limit = folder / "run", limit
        config = folder / "run.yaml"
        config.write_text(run_config(epochs=EPOCHS, eval_every=EPOCHS).to_yaml())
        self.log = folder / "run.txt"
        port = ["--master-port", str(free_ports(1)[0])] if "--rdzv-backend" not in options else []
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *port, *options]
        command += ["-m", "deformable_detr", "train", str(folder / "data"), "--out", str(self.out)]
        command += ["--resume"] if resume else ["--config", str(config)]
        with open(self.log, "a") as log_file:
            self.launcher = subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,
            )
        self.deadline = time.monotonic() + limit

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.signal_all(signal.SIGKILL)
        self.launcher.wait()

    def signal_all(self, number):
        for process in [self.launcher.pid, *self.workers().values()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def workers(self):
        """Return the process ids by rank."""
        pids = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                parent = int(process.joinpath("stat").read_text().rpartition(")")[2].split()[1])
                environment = process.joinpath("environ").read_bytes().split(b"\0")
            except (OSError, ValueError):
                continue
            ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
            if parent == self.launcher.pid and ranks:
                pids[ranks[0]] = int(process.name)
        return pids

    def wait(self, until=None):
        """Wait for a condition or, without one, for the end of the launcher; return its exit code."""
        while self.launcher.poll() is None and not (until and until()):
            if time.monotonic() > self.deadline:
                pytest.fail(f"torchrun hangs after {self.limit} s\n{self.log.read_text()[-3000:]}")
            time.sleep(0.02)
        return self.launcher.poll()

    def steps(self):
        """Return the logged training steps."""
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        return [record["step"] for record in records if record["kind"] == "train"]

    def saved(self):
        """Return the step of the last checkpoint, or 0."""
        states = (self.out / "checkpoints" / "last").glob("state-*.json")
        return max((json.loads(path.read_text())["state"]["train_state"]["step"] for path in states), default=0)


def outcome(out):
    """Return losses by step and the weights of the exported model."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if record["kind"] == "train"}
    return losses, DeformableDETR.from_pretrained(out).state_dict()


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory):
    """Two undisturbed processes, started with the README's command."""
    folder = tmp_path_factory.mktemp("reference")
    write_dataset(folder / "data", train=8, val=2)
    with Torchrun(folder) as run:
        assert run.wait() == 0, run.log.read_text()[-3000:]
        assert "total batch size 4 (2 processes" in run.log.read_text()
        assert "Warning" not in run.log.read_text()
        assert run.steps() == list(range(1, 2 * EPOCHS + 1))
    return folder


def assert_same_outcome(out, expected):
    losses, weights = outcome(out)
    expected_losses, expected_weights = outcome(expected)
    assert losses == expected_losses
    assert all(torch.equal(weights[name], value) for name, value in expected_weights.items())


@pytest.mark.slow
def test_killed_process_is_restarted_and_the_run_resumes(reference_run, tmp_path):
    write_dataset(tmp_path / "data", train=8, val=2)
    options = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_ports(1)[0]}", "--max-restarts", "1")
    with Torchrun(tmp_path, *options) as run:
        run.wait(until=lambda: run.saved() >= 4)
        os.kill(run.workers()[1], signal.SIGKILL)
        code = run.wait()
        log = run.log.read_text()
        assert code == 0, log[-3000:]
        assert log.count("total batch size 4") == 2  # one start and one restart
        assert run.steps() == list(range(1, 2 * EPOCHS + 1))
    assert_same_outcome(tmp_path / "run", reference_run / "run")


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_a_checkpoint(reference_run, tmp_path):
    write_dataset(tmp_path / "data", train=8, val=2)
    with Torchrun(tmp_path) as run:
        run.wait(until=lambda: run.saved() >= 2)
        os.kill(run.launcher.pid, signal.SIGTERM)
        assert run.wait() != 0
        assert "resume with --resume" in run.log.read_text()
        stopped = run.saved()
        assert 2 <= stopped < 2 * EPOCHS
        assert max(run.steps()) == stopped
    with Torchrun(tmp_path, resume=True) as run:
        assert run.wait() == 0, run.log.read_text()[-3000:]
    assert_same_outcome(tmp_path / "run", reference_run / "run")


@pytest.mark.slow
def test_killed_process_ends_the_run_without_max_restarts(tmp_path):
    write_dataset(tmp_path / "data", train=8, val=2)
    with Torchrun(tmp_path) as run:
        run.wait(until=lambda: run.saved() >= 2)
        os.kill(run.workers()[1], signal.SIGKILL)
        assert run.wait() != 0
        assert max(run.steps()) < 2 * EPOCHS
    load_checkpoint(tmp_path / "run" / "checkpoints" / "last")


@pytest.mark.slow
def test_timeout_kills_all_processes(tmp_path):
    write_dataset(tmp_path / "data", train=8, val=2)
    with Torchrun(tmp_path, limit=0.1) as run:
        with pytest.raises(pytest.fail.Exception, match="hangs"):
            run.wait()
        processes = [run.launcher.pid, *run.workers().values()]
    assert not any(Path(f"/proc/{process}").exists() for process in processes)


def test_slurm_script_is_valid_shell():
    text = (ROOT / "docs" / "distributed.md").read_text()
    script = text[text.index("#!/bin/bash") :].partition("```")[0]
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
