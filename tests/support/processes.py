"""Run a job of `distributed_jobs.py` in several processes, as torchrun would, with a time limit."""

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

LIMIT = 900  # seconds, for a loaded machine; a job takes about 20 on an idle one


@dataclass
class ProcessResult:
    """Exit code, output and results of a process."""

    code: int
    output: str
    results: dict[str, Any]


def launch(job: str, folder: Path, size: int = 2, limit: float = LIMIT, **environment: str) -> list[ProcessResult]:
    """Return the results by rank; on a timeout, kill all processes and fail the test."""
    ports = ",".join(map(str, free_ports(8)))
    running = []
    for rank in range(size):
        launch_variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "JOB_PORTS": ports,
        }
        settings = {
            **os.environ,
            **{name: str(value) for name, value in launch_variables.items()},
            "OMP_NUM_THREADS": "1",
        }
        with open(folder / f"{job}-{rank}.txt", "w") as log:
            command = [sys.executable, str(Path(__file__).with_name("distributed_jobs.py")), job, str(folder)]
            running.append(
                subprocess.Popen(
                    command, env={**settings, **environment}, stdout=log, stderr=log, start_new_session=True
                )
            )
    deadline = time.monotonic() + limit
    try:
        for process in running:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        logs = [(folder / f"{job}-{rank}.txt").read_text()[-1500:] for rank in range(size)]
        pytest.fail(f"{job} hangs: killed after {limit:.0f} s\n" + "\n---\n".join(logs))
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return [_process_result(process, folder, f"{job}-{rank}") for rank, process in enumerate(running)]


def _process_result(process: subprocess.Popen, folder: Path, name: str) -> ProcessResult:
    results = folder / f"{name}.json"
    values = json.loads(results.read_text()) if results.exists() else {}
    return ProcessResult(process.returncode, (folder / f"{name}.txt").read_text(), values)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()
