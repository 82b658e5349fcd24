"""The folder of a run: who may write there, what is in it, and whether a run can go on."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.resolve import read_config_file
from ..config.schema import Config, ModelConfig
from ..utils.errors import UserError
from ..utils.files import replace_file
from .checkpoint import KEPT, generations, load_checkpoint, load_state, save_checkpoint, share_as_folder

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.dataset import CocoDataset
    from ..detector import DeformableDETR
    from ..weights.model_card import ModelCardData

log = logging.getLogger(__name__)

# What a run writes. A folder that holds any of it belongs to a run or to a model, and is not written over.
CONFIG = "config.yaml"
LOCK = ".lock"
_CONTENTS = (CONFIG, "config.json", "model.safetensors", "metrics.jsonl", "tensorboard", "checkpoints")
# Settings that a run may change when it goes on: they change how the network is computed or built, not what it is.
_FREE_MODEL_KEYS = {"backbone_weights", "backbone_norm", "frozen_stages", "gradient_checkpointing"}


class RunDir:
    """`config.yaml`, `config.json` + `model.safetensors` (the best model), `metrics.jsonl`, `tensorboard/` and
    `checkpoints/last`, `checkpoints/best`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.last = self.path / "checkpoints" / "last"
        self.best = self.path / "checkpoints" / "best"

    @contextmanager
    def held(self, resume: bool) -> Iterator[None]:
        """`claim`, and nobody else may write the folder within: `UserError` where another process does.

        The system lets go of the lock when a process dies. Of a run of several processes, one holds it.
        """
        from filelock import FileLock, Timeout

        self.claim(resume)
        place = self.path / LOCK
        lock = FileLock(place, timeout=0, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"output folder {self.path} is being written by another process: wait for it, or choose another folder"
            ) from None
        except (OSError, NotImplementedError) as error:  # some network file systems have no locks
            log.warning("%s cannot be locked (%s): see to it that no other process writes there", self.path, error)
        try:
            self.claim(resume)  # another process may have been quicker
            self._clear()
            yield
        finally:
            if lock.is_locked:
                with suppress(OSError):  # Windows deletes no open file
                    place.unlink()
                lock.release()

    def claim(self, resume: bool) -> None:
        """Makes the folder, or raises `UserError`: not writable, taken by another run, or (resume) no run in it."""
        if resume and not self.begun:
            raise UserError(f"nothing to resume: there is no run in {self.path}; leave --resume out to start one")
        taken = [name for name in _CONTENTS if (self.path / name).exists()]
        if taken and not resume:
            raise UserError(
                f"output folder {self.path} already holds a run or a model ({taken[0]}): "
                "go on with --resume, or choose another folder"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise UserError(f"output folder {self.path} cannot be written: {error.strerror or error}") from None

    def write_config(self, config: Config) -> None:
        """Puts the whole config into config.yaml."""
        replace_file(self.path / CONFIG, config.to_yaml())

    def save(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], best: bool = False) -> None:
        """Makes these the last checkpoint, the one before stays too; or the best, of which there is one."""
        save_checkpoint(self.best if best else self.last, tensors, state, 1 if best else KEPT)

    @property
    def begun(self) -> bool:
        """Whether there is a run that `resume` finds."""
        return os.path.isfile(self.path / CONFIG)

    def restore(self, config: Config, data_fingerprint: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Tensors and state of the latest good checkpoint; None where the run ended before its first.

        A damaged one is left for the one before, or for the best, which is said in one line. Raises `UserError` where
        none is good, or the data, the classes or the network are not the run's.
        """
        if (self.last / "state.json").exists():
            raise UserError(f"cannot resume {self.path}: its checkpoints are of an earlier version of this program")
        if not (found := self._latest_good()):
            return None
        tensors, state = found
        before, now = ModelConfig.from_dict(state["model"], str(self.last)), config.model
        if (before.class_names, before.category_ids) != (now.class_names, now.category_ids):
            raise UserError(
                f"cannot resume {self.path}: the training set's classes are not those of the run "
                f"({_difference(before, now)})"
            )
        if state["data"] != data_fingerprint:
            raise UserError(f"cannot resume {self.path}: the training set has changed since the run began")
        for key, value in before.model_dump().items():
            if key not in _FREE_MODEL_KEYS and value != getattr(now, key):
                raise UserError(
                    f"cannot resume {self.path}: model.{key} is {value!r} in the run and {getattr(now, key)!r} now"
                )
        return tensors, state

    def _latest_good(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The checkpoint of the most steps that is whole. Later ones of `last`, which are not, are put aside."""
        failures: list[UserError] = []
        states: list[tuple[int, Path]] = []
        for path in (*generations(self.last), *generations(self.best)):
            try:
                states.append((load_state(path)["counters"]["step"], path))
            except UserError as error:
                failures.append(error)
        for step, path in sorted(states, key=lambda item: -item[0]):  # of equal steps, `last` comes first
            try:
                found = load_checkpoint(path)
            except UserError as error:
                failures.append(error)
                continue
            if failures:
                log.warning("%s; the run goes on from %s, step %d", failures[0], path, step)
                self._put_aside(path)
            return found
        if failures:
            raise UserError(f"{failures[0]}, and no checkpoint in {self.path} is good: start another run")
        return None

    def _put_aside(self, good: Path) -> None:
        """Damaged generations no longer count among those that are kept; the next save deletes them."""
        for path in generations(self.last):
            if path == good:
                break
            with suppress(OSError):
                path.rename(path.with_name(path.name.replace("state-", "damaged-")))

    def _clear(self) -> None:
        """Deletes what a killed process was about to write."""
        for path in (*self.path.glob(".export-*"), *self.path.glob(".*.tmp")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def export(self, model: DeformableDETR, facts: ModelCardData | None = None) -> None:
        """Makes the model the one that `from_pretrained` finds in the run folder; `facts` are for its card."""
        from ..weights.model_card import FILE as CARD
        from ..weights.model_card import somebodys_own

        temporary = Path(tempfile.mkdtemp(prefix=".export-", dir=self.path))
        try:
            model.save_pretrained(temporary, facts)
            if somebodys_own(self.path):
                (temporary / CARD).unlink()
            # config.json, by which a folder is known to hold a model, appears last.
            for file in sorted(temporary.iterdir(), key=lambda file: (file.name == "config.json", file.name)):
                share_as_folder(file, self.path)
                os.replace(file, self.path / file.name)
        except OSError as error:
            raise UserError(
                f"model in {self.path} cannot be written: {error.strerror or error}; the last checkpoint is good: "
                "go on with --resume once that is mended"
            ) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def run_config(out: str | os.PathLike[str]) -> Config:
    """The config of the run in a folder, as it was started: what --resume goes on with."""
    path = Path(out) / CONFIG
    if not path.is_file():
        raise UserError(f"nothing to resume: there is no run in {out}; leave --resume out to start one")
    return Config.from_dict(read_config_file(path), str(path))


def fingerprint(dataset: CocoDataset) -> str:
    """Tells a training set from others, wherever its folder lies: the checksum of its annotations."""
    return dataset.fingerprint()


def _difference(before: ModelConfig, now: ModelConfig) -> str:
    """The first class that is another one, and the numbers of classes."""
    pairs = [zip_longest(model.category_ids, model.class_names) for model in (before, now)]
    first = next(pair for pair in zip_longest(*pairs) if pair[0] != pair[1])
    was, is_now = ("none" if one is None else f"{one[1]!r} with id {one[0]}" for one in first)
    counts = f"{len(before.class_names)} classes, now {len(now.class_names)}"
    return f"{counts}; the first that differs was {was} and is {is_now}"
