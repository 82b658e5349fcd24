"""The folder of a run: who may write there, what is in it, and whether a run can go on."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config, ModelConfig, read_config_file
from ..errors import UserError
from .checkpoint import load_checkpoint, share_as_folder, write_text

if TYPE_CHECKING:
    from ..data.coco import CocoDataset
    from ..model.detector import DeformableDETR
    from ..weights.card import Facts

# What a run writes. A folder that holds any of it belongs to a run or to a model, and is not written over.
CONFIG = "config.yaml"
_CONTENTS = (CONFIG, "config.json", "model.safetensors", "metrics.jsonl", "tensorboard", "checkpoints")
# Settings that a run may change when it goes on: they change how the network is computed or built, not what it is.
_FREE_MODEL_KEYS = {"backbone_weights", "backbone_norm", "frozen_stages", "gradient_checkpointing"}


class RunFolder:
    """`config.yaml`, `config.json` + `model.safetensors` (the best model), `metrics.jsonl`, `tensorboard/` and
    `checkpoints/last`, `checkpoints/best`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.last = self.path / "checkpoints" / "last"
        self.best = self.path / "checkpoints" / "best"

    def claim(self, resume: bool) -> None:
        """Makes the folder, or raises `UserError`: not writable, taken by another run, or (resume) no run in it."""
        if resume and not (self.path / CONFIG).is_file():
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
        write_text(self.path / CONFIG, config.to_yaml())

    def restore(self, config: Config, data_fingerprint: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Tensors and state of the last checkpoint; None where the run ended before its first.

        Raises `UserError` where the checkpoint is damaged or the data, the classes or the network are not the run's.
        """
        if not self.last.exists():
            return None
        tensors, state = load_checkpoint(self.last)
        before, now = ModelConfig.read(state["model"], str(self.last)), config.model
        if (before.class_names, before.category_ids) != (now.class_names, now.category_ids):
            raise UserError(
                f"cannot resume {self.path}: the training set's classes are not those of the run "
                f"({_sample(before)}; now {_sample(now)})"
            )
        if state["data"] != data_fingerprint:
            raise UserError(f"cannot resume {self.path}: the training set has changed since the run began")
        for key, value in before.model_dump().items():
            if key not in _FREE_MODEL_KEYS and value != getattr(now, key):
                raise UserError(
                    f"cannot resume {self.path}: model.{key} is {value!r} in the run and {getattr(now, key)!r} now"
                )
        return tensors, state

    def export(self, model: DeformableDETR, facts: Facts | None = None) -> None:
        """Makes the model the one that `from_pretrained` finds in the run folder; `facts` are for its card."""
        temporary = Path(tempfile.mkdtemp(prefix=".export-", dir=self.path))
        try:
            model.save_pretrained(temporary, facts)
            for file in temporary.iterdir():
                share_as_folder(file, self.path)
                os.replace(file, self.path / file.name)
        except OSError as error:
            raise UserError(f"model in {self.path} cannot be written: {error.strerror or error}") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def run_config(out: str | os.PathLike[str]) -> Config:
    """The config of the run in a folder, as it was started: what --resume goes on with."""
    path = Path(out) / CONFIG
    if not path.is_file():
        raise UserError(f"nothing to resume: there is no run in {out}; leave --resume out to start one")
    return Config.read(read_config_file(path), str(path))


def fingerprint(dataset: CocoDataset) -> str:
    """Tells a training set from others, wherever its folder lies: the checksum of its annotations."""
    return dataset.fingerprint()


def _sample(model: ModelConfig) -> str:
    names = ", ".join(model.class_names[:3])
    return f"{len(model.class_names)} classes: {names}{', …' if len(model.class_names) > 3 else ''}"
