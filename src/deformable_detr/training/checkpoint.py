"""Checkpoints that are whole or not there: a folder of generations, each of safetensors files and a state-N.json.

The tensors go to files with new names; the state that names them and has their checksums appears last, at one moment.
Only then are the oldest files deleted. A crash at any time leaves the generations that there were, and every change of
a bit, in any file, is noticed when it is read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.errors import UserError
from ..utils.files import checksum, replace_file, verify_checksum

KEPT = 2  # generations in a folder: the last, and the one before to fall back to
_FORMAT = "deformable-detr-checkpoint"
_VERSION = 2
_SERIAL = re.compile(r"-(\d+)\.(?:safetensors|json)")

Tensors = dict[str, Tensor]


def save_checkpoint(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], kept: int = KEPT
) -> None:
    """Adds the generation of these tensors (one file a group) and this JSON state; the `kept` latest stay.

    Raises UserError where the folder cannot be written (disk full, no permission); the generations that were there
    before are then still there.
    """
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        serial = 1 + max((_serial(path) for path in folder.iterdir()), default=0)
        files = {}
        for group, values in tensors.items():
            path = folder / f"{group}-{serial}.safetensors"
            written.append(path)
            _write_tensors(path, values)
            files[group] = {"name": path.name, "sha256": checksum(path)}
        _sync(folder)
        replace_file(folder / f"state-{serial}.json", _to_json({"files": files, "state": dict(state)}))
        _sync(folder)
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise _not_written(folder, error) from None
    stay = {_serial(path) for path in generations(folder)[:kept]}
    for path in (*folder.glob("*-*.safetensors"), *folder.glob("*-*.json"), *folder.glob(".*.tmp")):
        if path.name.startswith(".") or _serial(path) not in stay:
            path.unlink(missing_ok=True)


def update_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Gives the latest generation in `folder` another JSON state and keeps its tensors."""
    path = _latest(folder)
    document = {**_read(path), "state": dict(state)}
    try:
        replace_file(path, _to_json(document))
    except OSError as error:
        raise _not_written(folder, error) from None


def generations(folder: Path) -> list[Path]:
    """The state files of the generations in a checkpoint folder, the latest first; none where there is no folder."""
    found = (path for path in folder.glob("state-*.json") if _serial(path))
    return sorted(found, key=_serial, reverse=True)


def load_checkpoint(source: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """The tensors of each group, on the CPU, and the state.

    source: a state file, one of `generations`; of a folder, the latest. A missing or damaged file is a `UserError`
    naming it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = source if source.suffix == ".json" else _latest(source)
    document = _read(path)
    tensors = {}
    for group, file in document["files"].items():
        path = path.with_name(file["name"])
        verify_checksum(path, file["sha256"])
        try:
            tensors[group] = load_file(path)
        except OSError as error:
            raise UserError(f"checkpoint file {path} cannot be read: {error.strerror or error}") from None
        except SafetensorError as error:
            raise UserError(f"checkpoint file {path} is damaged: {error}") from None
    return tensors, document["state"]


def load_state(path: Path) -> dict[str, Any]:
    """The state alone, of one of `generations`; a `UserError` names a damaged file."""
    return _read(path)["state"]


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


def _to_json(content: Mapping[str, Any]) -> str:
    """A state file: its format, the checksum of its content, and the content."""
    body = json.dumps(content, allow_nan=False)
    document = {"format": _FORMAT, "version": _VERSION, "sha256": hashlib.sha256(body.encode()).hexdigest(), **content}
    return json.dumps(document, allow_nan=False) + "\n"


def _read(path: Path) -> dict[str, Any]:
    """The content of a state file: "files" and "state"."""
    try:
        text = path.read_bytes().decode()
        document = json.loads(text)
        if (document["format"], document["version"]) != (_FORMAT, _VERSION):
            raise UserError(f"checkpoint file {path} is of another format or version")
        content = {"files": document["files"], "state": document["state"]}
        # Not the checksum alone: written anew, the content must be this file, to the last space.
        whole = _to_json(content) == text
    except OSError as error:
        raise UserError(f"checkpoint file {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole, content = False, {}
    if not whole:
        raise UserError(f"checkpoint file {path} is damaged")
    return content


def _latest(folder: Path) -> Path:
    found = generations(folder)
    if not found:
        raise UserError(f"there is no checkpoint in {folder}")
    return found[0]


def _serial(path: Path) -> int:
    """The number of the generation that a file belongs to; 0 for other files."""
    match = _SERIAL.search(path.name)
    return int(match[1]) if match and match.end() == len(path.name) else 0


def _not_written(folder: Path, error: OSError) -> UserError:
    before = "the one before is good: go on with --resume once that is mended"
    left = before if generations(folder) else "mend that"
    return UserError(f"checkpoint {folder} cannot be written: {error.strerror or error}; {left}")


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
    except SafetensorError as error:  # it has the system's error as text only
        number = re.search(r"os error (\d+)|code: (\d+)", str(error))
        code = int(number[1] or number[2]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error)) from None
    share_as_folder(path)
    _sync(path)


def _sync(path: Path) -> None:
    """Waits until the file or folder is on the disk (folders: where the system can)."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
