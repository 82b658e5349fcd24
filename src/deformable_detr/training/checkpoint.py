"""Atomic checkpoints: a folder of generations, each of safetensors files and a state-N.json.

Tensors go to files with new names. The state file, which names them with their checksums, appears last and atomically;
then the oldest generation is deleted. A crash at any time leaves a complete generation, and any changed bit is noticed.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.schema import Config
from ..utils.errors import UserError
from ..utils.files import checksum, read_regular, replace_file

Tensors = Mapping[str, Mapping[str, Tensor]]  # by group and name

_FORMAT, _VERSION = "deformable-detr-checkpoint", 3
_GENERATION = re.compile(r"-(\d+)\.(?:safetensors|json)")
# Settings that a resumed run may change: they affect how the network is built or computed, not what its weights mean.
_FREE_MODEL_KEYS = {"backbone_weights", "backbone_norm", "frozen_stages", "gradient_checkpointing"}

log = logging.getLogger(__name__)


class CheckpointManager:
    """The checkpoints of a run: `last` keeps two generations, `best` the one with the highest AP."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.last, self.best = folder, folder / "last", folder / "best"

    def save(self, tensors: Tensors, state: Mapping[str, Any], best: bool = False) -> None:
        """Save a generation as the last or the best checkpoint; raises as `save_checkpoint`."""
        save_checkpoint(self.best if best else self.last, tensors, state, keep=1 if best else 2)

    def restore(self, config: Config, data_fingerprint: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return tensors and state of the latest intact checkpoint; None if the run saved none.

        A warning names a damaged checkpoint and the older one that is used instead. Raises UserError if all are
        damaged, or if the data or the network differ from the run's.
        """
        checkpoint = self._latest_intact()
        if checkpoint is None:
            return None
        run = self.folder.parent
        saved, now = type(config.model).from_dict(checkpoint[1]["model"], str(self.last)), config.model
        if checkpoint[1]["data"] != data_fingerprint:
            raise UserError(f"cannot resume {run}: the training set has changed since the run started")
        for key, value in saved.model_dump().items():
            if key not in _FREE_MODEL_KEYS and value != getattr(now, key):
                raise UserError(f"cannot resume {run}: model.{key} is {value!r} in the run, not {getattr(now, key)!r}")
        return checkpoint

    def _latest_intact(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return the intact checkpoint with the most steps, and delete the state files of damaged later ones."""
        errors: dict[Path, UserError] = {}
        candidates: list[tuple[int, Path]] = []
        for path in (*generations(self.last), *generations(self.best)):
            try:
                candidates.append((_read(path)["state"]["train_state"]["step"], path))
            except UserError as error:
                errors[path] = error
        for step, path in sorted(candidates, key=lambda item: -item[0]):  # `last` first among equal steps
            try:
                checkpoint = load_checkpoint(path)
            except UserError as error:
                errors[path] = error
                continue
            if errors:
                log.warning("%s; resuming from %s, step %d", next(iter(errors.values())), path, step)
            for damaged in errors:  # otherwise `save` would keep it instead of an intact one
                damaged.unlink(missing_ok=True)
            return checkpoint
        if errors:
            error = next(iter(errors.values()))
            raise UserError(f"{error}, and no other checkpoint in {self.folder} is intact: start a new run")
        return None


def save_checkpoint(folder: Path, tensors: Tensors, state: Mapping[str, Any], keep: int = 2) -> None:
    """Add a generation with one file per group of tensors and this JSON state; keep the latest `keep` generations.

    Raises UserError if the folder cannot be written; the older generations are then unchanged.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((_number(path) for path in folder.iterdir()), default=0)
        files = {}
        for group, values in tensors.items():
            path = folder / f"{group}-{number}.safetensors"
            _write_tensors(path, values)
            files[group] = {"name": path.name, "sha256": checksum(path)}
        _sync_folder(folder)
        replace_file(folder / f"state-{number}.json", _to_json({"files": files, "state": dict(state)}))
        _sync_folder(folder)
    except OSError as error:
        _delete_all_but(folder, generations(folder))
        raise _write_error(folder, error) from None
    _delete_all_but(folder, generations(folder)[:keep])


def _delete_all_but(folder: Path, states: Sequence[Path]) -> None:
    """Delete the files of all generations but these, and temporary files of killed processes."""
    kept = {0, *map(_number, states)}
    for path in folder.glob("*"):
        if path.suffix == ".tmp" or _number(path) not in kept:
            path.unlink(missing_ok=True)


def update_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Replace the JSON state of the latest generation in `folder`; its tensors stay."""
    path = generations(folder)[0]
    content = {**_read(path), "state": dict(state)}
    try:
        replace_file(path, _to_json(content))
    except OSError as error:
        raise _write_error(folder, error) from None


def generations(folder: Path) -> list[Path]:
    """Return the state files of a checkpoint folder, the latest first; none if there is no folder."""
    return sorted(filter(_number, folder.glob("state-*.json")), key=_number, reverse=True)


def load_checkpoint(source: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the tensors by group, on the CPU, and the state, from a state file or from the latest one in a folder.

    Raises UserError, naming the file, if one is missing or damaged.
    """
    from safetensors.torch import load_file

    path = source if source.suffix == ".json" else next(iter(generations(source)), None)
    if path is None:
        raise UserError(f"there is no checkpoint in {source}")
    content = _read(path)
    tensors = {}
    try:
        for group, file in content["files"].items():
            path = path.with_name(file["name"])
            if checksum(path) != file["sha256"]:
                raise UserError(f"checkpoint file {path} is damaged (its checksum is wrong)")
            tensors[group] = load_file(path)
    except OSError as error:
        raise UserError(f"checkpoint file {path} cannot be read: {error.strerror or error}") from None
    return tensors, content["state"]


def random_state() -> dict[str, Any]:
    """Return the state of PyTorch's random generators, ready for JSON; training draws from no others."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state().tolist(), "cuda": [state.tolist() for state in devices]}


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned; states of GPUs that this machine lacks are ignored."""
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    for index, values in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(torch.tensor(values, dtype=torch.uint8), index)


def _to_json(content: Mapping[str, Any]) -> str:
    """Return the text of a state file: its format, the checksum of its content, and the content."""
    sha256 = hashlib.sha256(json.dumps(content, allow_nan=False).encode()).hexdigest()
    return json.dumps({"format": _FORMAT, "version": _VERSION, "sha256": sha256, **content}) + "\n"


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a state file: "files" and "state"."""
    try:
        text = read_regular(path).decode()
        document = json.loads(text)
        if (document["format"], document["version"]) != (_FORMAT, _VERSION):
            raise UserError(f"checkpoint file {path} is of another format or version: start a new run")
        content = {"files": document["files"], "state": document["state"]}
        intact = _to_json(content) == text  # the checksum alone would miss changes outside of the content
    except OSError as error:
        raise UserError(f"checkpoint file {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact, content = False, {}
    if not intact:
        raise UserError(f"checkpoint file {path} is damaged")
    return content


def _number(path: Path) -> int:
    """Return the number of the generation that a file belongs to; 0 for other files."""
    match = _GENERATION.search(path.name)
    return int(match[1]) if match and match.end() == len(path.name) else 0


def _write_error(folder: Path, error: OSError) -> UserError:
    hint = "resume from the checkpoint before with --resume" if generations(folder) else "fix this and start again"
    return UserError(f"checkpoint {folder} cannot be written: {error.strerror or error}; {hint}")


def _write_tensors(path: Path, values: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    seen: set[int] = set()
    separate = {}
    for name, value in values.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        separate[name] = value.clone() if storage in seen else value  # safetensors refuses shared memory
        seen.add(storage)
    replace_file(path, lambda temporary: save_file(separate, temporary))


def _sync_folder(folder: Path) -> None:
    """Flush the names of a folder to the disk."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
