"""Checkpoints that are whole or not there: a folder of safetensors files and the state.json that names them.

The tensors go to files with new names; replacing state.json is the one moment at which a new checkpoint takes the
place of the old, whose files are deleted after it. A crash at any time leaves one complete checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

STATE = "state.json"
_FORMAT = "deformable-detr-checkpoint"
_VERSION = 1

Tensors = dict[str, Tensor]


def save_checkpoint(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Makes `folder` the checkpoint of these tensors (one file a group) and this JSON state.

    Raises UserError where the folder cannot be written (disk full, no permission); the checkpoint that was there
    before is then still there.
    """
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        serials = (path.stem.rpartition("-")[2] for path in folder.glob("*-*.safetensors"))
        serial = 1 + max((int(text) for text in serials if text.isdecimal()), default=0)
        files = {}
        for group, values in tensors.items():
            path = folder / f"{group}-{serial}.safetensors"
            written.append(path)
            _write_tensors(path, values)
            files[group] = {"name": path.name, "sha256": _checksum(path)}
        document = {"format": _FORMAT, "version": _VERSION, "files": files, "state": dict(state)}
        _sync(folder)
        write_text(folder / STATE, _to_json(document))
        _sync(folder)
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise UserError(f"checkpoint {folder} cannot be written: {error.strerror or error}") from None
    for path in {*folder.glob("*.safetensors"), *folder.glob(".*.tmp")} - set(written):
        path.unlink()


def update_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Gives the checkpoint in `folder` another JSON state and keeps its tensors."""
    try:
        document = json.loads((folder / STATE).read_text(encoding="utf-8"))
        write_text(folder / STATE, _to_json({**document, "state": dict(state)}))
    except OSError as error:
        raise UserError(f"checkpoint {folder} cannot be written: {error.strerror or error}") from None


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """The tensors of each group, on the CPU, and the state. A missing or damaged file is a `UserError` naming it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / STATE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != _FORMAT or document["version"] != _VERSION:
            raise UserError(f"checkpoint {path} is of another format or version")
        files = {group: (folder / file["name"], file["sha256"]) for group, file in document["files"].items()}
        state = document["state"]
    except OSError as error:
        raise UserError(f"checkpoint file {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"checkpoint file {path} is damaged") from None

    tensors = {}
    for group, (path, checksum) in files.items():
        try:
            if _checksum(path) != checksum:
                raise UserError(f"checkpoint file {path} is damaged (its checksum is wrong)")
            tensors[group] = load_file(path)
        except OSError as error:
            raise UserError(f"checkpoint file {path} cannot be read: {error.strerror or error}") from None
        except SafetensorError as error:
            raise UserError(f"checkpoint file {path} is damaged: {error}") from None
    return tensors, state


def write_text(path: Path, text: str) -> None:
    """Replaces the file at once by one with this text, flushed to the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def share_as_folder(path: Path, folder: Path | None = None) -> None:
    """Lets those read (write) a file who may read (write) its folder: safetensors makes files for the owner only."""
    path.chmod((folder or path.parent).stat().st_mode & 0o666)


def random_state() -> dict[str, Any]:
    """The state of all random generators of this process, as JSON holds it."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": _to_text(torch.get_rng_state()),
        "cuda": [_to_text(state) for state in devices],
        "python": random.getstate(),
        "numpy": [np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Takes back what `random_state` gave; GPU generators that this machine has not are left out."""
    torch.set_rng_state(_from_text(state["torch"]))
    for index, text in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_from_text(text), index)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def _to_json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, allow_nan=False) + "\n"


def _to_text(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _from_text(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def _write_tensors(path: Path, values: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    memory: set[int] = set()
    separate = {}
    for name, value in values.items():
        value = value.detach().cpu().contiguous()
        # Layers that share a head have its tensors twice; safetensors wants each in memory of its own.
        place = value.untyped_storage().data_ptr()
        separate[name] = value.clone() if place in memory else value
        memory.add(place)
    try:
        save_file(separate, path)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    share_as_folder(path)
    _sync(path)


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Waits until the file or folder is on the disk (folders: where the system can)."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
