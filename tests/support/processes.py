"""Runs a job of `distributed_jobs.py` in several processes, as torchrun would, under the eyes of a watchdog."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

LIMIT = 900  # seconds, on a machine that does other things too; a job takes some 20 on an idle one


@dataclass
class Ended:
    """How a process ended: its exit code, what it said, and what it wrote down."""

    code: int
    said: str
    results: dict[str, Any]


def launch(job: str, folder: Path, size: int = 2, limit: float = LIMIT, **environment: str) -> list[Ended]:
    """The processes by rank. Where one is not done in time, all are killed and the test fails."""
    ports = ",".join(map(str, _free_ports(8)))
    running = []
    for rank in range(size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "JOB_PORTS": ports}
        settings = {**os.environ, **{name: str(value) for name, value in place.items()}, "OMP_NUM_THREADS": "1"}
        with open(folder / f"{job}-{rank}.txt", "w") as said:
            command = [sys.executable, str(Path(__file__).with_name("distributed_jobs.py")), job, str(folder)]
            running.append(
                subprocess.Popen(
                    command, env={**settings, **environment}, stdout=said, stderr=said, start_new_session=True
                )
            )
    deadline = time.monotonic() + limit
    try:
        for process in running:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        words = [(folder / f"{job}-{rank}.txt").read_text()[-1500:] for rank in range(size)]
        pytest.fail(f"{job} hangs: killed after {limit:.0f} s\n" + "\n---\n".join(words))
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return [_ended(process, folder, f"{job}-{rank}") for rank, process in enumerate(running)]


def _ended(process: subprocess.Popen, folder: Path, name: str) -> Ended:
    results = folder / f"{name}.json"
    known = json.loads(results.read_text()) if results.exists() else {}
    return Ended(process.returncode, (folder / f"{name}.txt").read_text(), known)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
