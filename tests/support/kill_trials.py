"""Kill a training repeatedly, half of the times inside a save; its result must equal an uninterrupted run.

    python tests/support/kill_trials.py FOLDER --workers 2 --kills 50

Every run is forked from this process, which has imported everything and trained nothing. Half of the kills come from
outside, at a random time. The others come from inside a save or an export, between two of its steps or with a file half
written. Prints one line of JSON. Exit code 0 means that every completed run has the losses, weights and metrics of the
uninterrupted run, and that every folder left by a kill loads or fails with a one-line error.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from deformable_detr.detector import DeformableDETR
from deformable_detr.training import checkpoint, trainer
from deformable_detr.training.checkpoint import CheckpointManager, load_checkpoint
from deformable_detr.training.run_dir import RunDir, run_config
from deformable_detr.training.trainer import train_model
from deformable_detr.utils.errors import UserError
from tests.support.training import tiny_config, write_dataset

TIMEOUT = 600.0  # seconds for one run, on a busy machine
MOMENTS = 30  # approximate number per save


class Killer:
    """Count the moments inside saves and exports, and kill this process at the `count`-th."""

    def __init__(self, count: int) -> None:
        self.left, self.inside = count, False

    def moment(self) -> None:
        if self.inside:
            self.left -= 1
            if self.left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        for name in ("_write_tensors", "checksum", "_sync_folder", "replace_file"):
            setattr(checkpoint, name, self.around(getattr(checkpoint, name)))
        os.replace = self.around(os.replace)
        Path.unlink = self.around(Path.unlink)  # pyright: ignore[reportAttributeAccessIssue]
        CheckpointManager.save = self.within(CheckpointManager.save)
        RunDir.export = self.within(RunDir.export)

    def around(self, work):
        def wrapped(*arguments, **options):
            self.moment()
            run_result = work(*arguments, **options)
            if self.inside and self.left == 1 and work.__name__ == "_write_tensors":
                os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
            self.moment()
            return run_result

        return wrapped

    def within(self, work):
        def wrapped(*arguments, **options):
            self.inside = True
            run_result = work(*arguments, **options)
            self.inside = False
            return run_result

        return wrapped


def config(workers: int, epochs: int):
    """Return a config with dropout, which depends on the random state, and frequent saves and evaluations."""
    tiny = tiny_config(epochs=epochs, batch_size=2)
    return tiny.updated({"model": {"dropout": 0.2}, "data": {"workers": workers, "check": "off"}})


def train(data: Path, out: Path, workers: int, epochs: int, kill_at: int, broken: str) -> None:
    """Start or resume the run, in the forked process. kill_at: moment of a save; 0: never."""
    log = open(f"{out}.log", "a")  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    assert trainer._SAVE_SECONDS > 0
    trainer._SAVE_SECONDS = 0.0  # save after every step
    if broken == "random":
        trainer.restore_random_state = lambda state: None
    if kill_at:
        Killer(kill_at).install()
    resume = (out / "config.yaml").is_file()
    train_model(data, out, run_config(out) if resume else config(workers, epochs), resume=resume)
    Path(f"{out}.modules").write_text("\n".join(sys.modules))


def run_forked(*arguments, seconds: float | None = None) -> bool:
    """Return whether a run completed; it is killed after `seconds`."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            train(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    end = time.monotonic() + (TIMEOUT if seconds is None else seconds)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                return False
            if status:
                raise AssertionError(f"a run failed, see {arguments[1]}.log")
            return True
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if seconds is None:
                raise AssertionError(f"a run does not end, see {arguments[1]}.log")
            return False
        time.sleep(0.002)


def run_result(out: Path) -> dict:
    """Return everything that must be equal bit for bit."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "images_per_second")
    lines = [{key: value for key, value in line.items() if not key.startswith(timed)} for line in lines]
    tensors, state = load_checkpoint(out / "checkpoints" / "last")
    arrays = {f"{group}/{name}": value for group, values in tensors.items() for name, value in values.items()}
    arrays |= {f"best/{name}": value for name, value in DeformableDETR.from_pretrained(out).state_dict().items()}
    return {"lines": lines, "tensors": arrays, "step": state["train_state"]["step"]}


def first_difference(first: dict, second: dict) -> str:
    """Describe the first difference of two results; empty if they are equal."""
    if first["step"] != second["step"]:
        return f"{first['step']} and {second['step']} steps"
    for line, other in zip(first["lines"], second["lines"], strict=False):
        if line != other:
            keys = [key for key in line.keys() | other.keys() if line.get(key) != other.get(key)]
            return f"{line['kind']} line of step {line['step']}: {sorted(keys)[:3]}"
    if len(first["lines"]) != len(second["lines"]):
        return "the number of lines"
    if first["tensors"].keys() != second["tensors"].keys():
        return "the names of the tensors"
    for name, value in first["tensors"].items():
        if not torch.equal(value, second["tensors"][name]):
            return name
    return ""


def folder_problem(out: Path) -> str:
    """Describe what is wrong with the folder of a killed run; empty if it loads or fails with a one-line error."""
    try:
        DeformableDETR.from_pretrained(out)
    except UserError as error:
        return "" if "\n" not in str(error) and not (out / "config.json").exists() else str(error)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3, help="of four steps each")
    parser.add_argument("--broken", default="", help="what to break, to verify the trial itself: random")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = random.Random(options.seed)
    shape = options.workers, options.epochs
    data = write_dataset(options.folder / "set")
    assert run_forked(data, options.folder / "first", *shape, 0, "")
    for name in (options.folder / "first.modules").read_text().splitlines():
        with contextlib.suppress(Exception):  # some cannot be imported by their names
            importlib.import_module(name)
    start = time.monotonic()
    assert run_forked(data, options.folder / "uninterrupted", *shape, 0, "")
    seconds = time.monotonic() - start
    uninterrupted = run_result(options.folder / "uninterrupted")
    assert not (fault := first_difference(run_result(options.folder / "first"), uninterrupted)), (
        f"two uninterrupted runs differ: {fault}"
    )

    kills = {"inside a save": 0, "at any time": 0}
    runs, faults = 0, []
    while sum(kills.values()) < options.kills:
        runs += 1
        out = options.folder / f"killed-{runs}"
        ended = False
        while not ended:
            # After the last kill, let the current run complete.
            if sum(kills.values()) >= options.kills:
                ended = run_forked(data, out, *shape, 0, options.broken)
                continue
            if kills["inside a save"] <= kills["at any time"]:
                how = "inside a save"
                ended = run_forked(data, out, *shape, generator.randint(1, 4 * MOMENTS), options.broken)
            else:
                how = "at any time"
                moment = generator.uniform(0, 0.7 * seconds)
                ended = run_forked(data, out, *shape, 0, options.broken, seconds=moment)
            if not ended:
                kills[how] += 1
                if fault := folder_problem(out):
                    faults.append(f"{out.name}: {fault}")
        if fault := first_difference(uninterrupted, run_result(out)):
            faults.append(f"{out.name}: {fault}")
        if "damaged" in Path(f"{out}.log").read_text():
            faults.append(f"{out.name}: a kill damaged a checkpoint")
    print(
        json.dumps({"kills": kills, "runs": runs, "steps": uninterrupted["step"], "seconds": seconds, "faults": faults})
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
