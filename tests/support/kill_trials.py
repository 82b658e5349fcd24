"""Trials: a training is killed again and again, half of the times inside a save, and must end as if it never was.

    python tests/kill_trials.py FOLDER --workers 2 --kills 50

Every run is forked from this process, which has imported all that a run needs and trained nothing. Half of the kills
come from outside, at a random time; the others from inside, at a random moment of a save or an export: between any two
of its steps, or with a file half written. Prints one line of JSON; exit code 0 where every run that ended has the
losses, the weights and the figures of the run that nobody killed, and no folder was ever left that is neither a model
nor says why.
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
MOMENTS = 30  # a save has about so many


class Killer:
    """Counts the moments inside saves and exports, and kills this process at the `count`-th."""

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
            result = work(*arguments, **options)
            if self.inside and self.left == 1 and work.__name__ == "_write_tensors":
                os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
            self.moment()
            return result

        return wrapped

    def within(self, work):
        def wrapped(*arguments, **options):
            self.inside = True
            result = work(*arguments, **options)
            self.inside = False
            return result

        return wrapped


def config(workers: int, epochs: int):
    """Epochs of four steps with dropout, which the random state decides; saved and evaluated often."""
    tiny = tiny_config(epochs=epochs, batch_size=2)
    return tiny.updated({"model": {"dropout": 0.2}, "data": {"workers": workers, "check": "off"}})


def train(data: Path, out: Path, workers: int, epochs: int, kill_at: int, broken: str) -> None:
    """In the forked process: starts the run or goes on with it. kill_at: moment of a save; 0 never."""
    log = open(f"{out}.log", "a")  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    assert trainer._SAVE_SECONDS > 0
    trainer._SAVE_SECONDS = 0.0  # after every step
    if broken == "random":
        trainer.restore_random_state = lambda state: None
    if kill_at:
        Killer(kill_at).install()
    resume = (out / "config.yaml").is_file()
    train_model(data, out, run_config(out) if resume else config(workers, epochs), resume=resume)
    Path(f"{out}.modules").write_text("\n".join(sys.modules))


def forked(*arguments, seconds: float | None = None) -> bool:
    """Whether a run came to its end; after `seconds` it is killed."""
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


def result(out: Path) -> dict:
    """What must be equal, to the last bit."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "images_per_second")
    lines = [{key: value for key, value in line.items() if not key.startswith(timed)} for line in lines]
    tensors, state = load_checkpoint(out / "checkpoints" / "last")
    found = {f"{group}/{name}": value for group, values in tensors.items() for name, value in values.items()}
    found |= {f"best/{name}": value for name, value in DeformableDETR.from_pretrained(out).state_dict().items()}
    return {"lines": lines, "tensors": found, "step": state["train_state"]["step"]}


def difference(first: dict, second: dict) -> str:
    """The first thing in which two results differ; '' where they are equal."""
    if first["step"] != second["step"]:
        return f"{first['step']} and {second['step']} steps"
    for one, other in zip(first["lines"], second["lines"], strict=False):
        if one != other:
            keys = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
            return f"{one['kind']} line of step {one['step']}: {sorted(keys)[:3]}"
    if len(first["lines"]) != len(second["lines"]):
        return "the number of lines"
    if first["tensors"].keys() != second["tensors"].keys():
        return "the names of the tensors"
    for name, value in first["tensors"].items():
        if not torch.equal(value, second["tensors"][name]):
            return name
    return ""


def opens_or_says_why(out: Path) -> str:
    """What is wrong with the folder of a killed run; '' where it is a model or there is one line that says why not."""
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
    parser.add_argument("--broken", default="", help="what to break, as a control of the trial itself: random")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = random.Random(options.seed)
    shape = options.workers, options.epochs
    data = write_dataset(options.folder / "set")
    assert forked(data, options.folder / "first", *shape, 0, "")
    for name in (options.folder / "first.modules").read_text().splitlines():
        with contextlib.suppress(Exception):  # some cannot be imported by their names
            importlib.import_module(name)
    began = time.monotonic()
    assert forked(data, options.folder / "whole", *shape, 0, "")
    seconds = time.monotonic() - began
    whole = result(options.folder / "whole")
    assert not (fault := difference(result(options.folder / "first"), whole)), f"two whole runs differ: {fault}"

    kills = {"inside a save": 0, "at any time": 0}
    runs, faults = 0, []
    while sum(kills.values()) < options.kills:
        runs += 1
        out = options.folder / f"killed-{runs}"
        ended = False
        while not ended:
            # The last kills may fall into a run that nobody kills any more: it goes to its end.
            if sum(kills.values()) >= options.kills:
                ended = forked(data, out, *shape, 0, options.broken)
                continue
            if kills["inside a save"] <= kills["at any time"]:
                how = "inside a save"
                ended = forked(data, out, *shape, generator.randint(1, 4 * MOMENTS), options.broken)
            else:
                how = "at any time"
                moment = generator.uniform(0, 0.7 * seconds)
                ended = forked(data, out, *shape, 0, options.broken, seconds=moment)
            if not ended:
                kills[how] += 1
                if fault := opens_or_says_why(out):
                    faults.append(f"{out.name}: {fault}")
        if fault := difference(whole, result(out)):
            faults.append(f"{out.name}: {fault}")
        if "damaged" in Path(f"{out}.log").read_text():
            faults.append(f"{out.name}: a kill damaged a checkpoint")
    print(json.dumps({"kills": kills, "runs": runs, "steps": whole["step"], "seconds": seconds, "faults": faults}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
