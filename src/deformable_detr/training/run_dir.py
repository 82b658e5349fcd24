"""The folder of a run: its files, its lock, and whether a run may start there."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.resolve import read_config_file
from ..config.schema import Config
from ..utils.errors import UserError
from ..utils.files import prepare_folder, replace_file
from .checkpoint import CheckpointManager

if TYPE_CHECKING:
    from ..predict.predictor import Detector
    from ..weights.model_card import ModelCardData

log = logging.getLogger(__name__)

CONFIG = "config.yaml"
LOCK = ".lock"
# A folder with any of these belongs to a run or a model and is not overwritten.
_RUN_FILES = (CONFIG, "config.json", "model.safetensors", "metrics.jsonl", "tensorboard", "checkpoints")


class RunDir:
    """A run folder: config.yaml, metrics.jsonl, checkpoints/, and the best model (config.json, model.safetensors)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.checkpoints = CheckpointManager(self.path / "checkpoints")

    @property
    def started(self) -> bool:
        """Whether the folder holds a run that can be resumed."""
        return os.path.isfile(self.path / CONFIG)

    def claim(self, resume: bool) -> None:
        """Create the folder.

        Raises UserError if it cannot be written, another run or model is in it, or (with `resume`) no run is.
        """
        if resume and not self.started:
            raise UserError(f"nothing to resume: there is no run in {self.path}; omit --resume to start one")
        taken = [name for name in _RUN_FILES if (self.path / name).exists()]
        if taken and not resume:
            raise UserError(
                f"output folder {self.path} already holds a run or a model ({taken[0]}): "
                "resume it with --resume, or choose another folder"
            )
        prepare_folder(self.path, "output folder")

    @contextmanager
    def lock(self, resume: bool) -> Iterator[None]:
        """Claim the folder and lock it against other processes; raises `UserError` as `claim`, or if it is locked.

        The system releases the lock when the process ends.
        """
        from filelock import FileLock, Timeout

        self.claim(resume)
        path = self.path / LOCK
        lock = FileLock(path, timeout=0, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"output folder {self.path} is being written by another process: wait for it, or choose another folder"
            ) from None
        except (OSError, NotImplementedError) as error:  # some network file systems have no locks
            log.warning("%s cannot be locked (%s): make sure that no other process writes to it", self.path, error)
        try:
            self.claim(resume)  # another process may have claimed it before the lock
            for leftover in self.path.glob(".*.tmp"):  # of a killed process
                leftover.unlink(missing_ok=True)
            yield
        finally:
            if lock.is_locked:
                with suppress(OSError):  # Windows cannot delete an open file
                    path.unlink()
                lock.release()

    def write_config(self, config: Config) -> None:
        """Write the whole config to config.yaml."""
        replace_file(self.path / CONFIG, config.to_yaml())

    def export(self, model: Detector, card: ModelCardData | None = None) -> None:
        """Save the model so that `from_pretrained` loads it from the run folder, with a model card from `card`."""
        try:
            model.save_pretrained(self.path, card)
        except UserError as error:
            raise UserError(f"{error}; fix this and resume from the last checkpoint with --resume") from None


def run_config(out: str | os.PathLike[str]) -> Config:
    """Return the config with which the run in a folder was started."""
    path = Path(out) / CONFIG
    if not path.is_file():
        raise UserError(f"nothing to resume: there is no run in {out}; omit --resume to start one")
    return Config.from_dict(read_config_file(path), str(path))
