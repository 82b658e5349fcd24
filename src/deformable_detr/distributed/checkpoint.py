"""Checkpoints of divided models: every process writes its part (`torch.distributed.checkpoint`), whole or not there.

A part goes into a folder of its own, which gets its name when all are written. The run's ordinary checkpoint, which has
no tensors then, names that folder and appears after it. Any number of processes can read it.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..utils.errors import UserError
from ..utils.files import checksum, refuse_changed

if TYPE_CHECKING:
    from .context import DistributedContext

Groups = dict[str, dict[str, Tensor]]
CHECKSUMS = "checksums.json"  # of the files of a checkpoint's parts, SHA-256


def save_parts(folder: Path, name: str, tensors: Groups, world: DistributedContext) -> None:
    """Makes `folder`/`name` hold these tensors, of which this process has its parts; all processes must call it.

    A folder of that name is there already where the same step was saved before, and is left.
    Raises UserError in all of them where one cannot write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    if world.broadcast_object((folder / name).is_dir()):
        return
    unfinished = folder / f".{name}.tmp"
    world.on_rank_zero(lambda: _renewed(unfinished))
    with world.sync_errors():
        try:
            save(_flat(tensors), checkpoint_id=unfinished)
        except (OSError, CheckpointException) as error:  # the latter in all processes
            raise UserError(f"checkpoint {folder / name} cannot be written: {_first_line(error)}") from None
    world.on_rank_zero(lambda: _finished(unfinished, folder / name))


def load_parts(path: Path, blank: Groups, world: DistributedContext) -> Groups:
    """Fills `blank`, the tensors of this process, from what any number of processes wrote; all must call it.

    What the checkpoint does not have, such as the optimizer's state of a parameter that never learnt, is left out.
    Raises UserError where it cannot be read. Whether it is whole is for `refuse_damaged`.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with world.sync_errors():
        try:
            stored = FileSystemReader(path).read_metadata().state_dict_metadata
            flat = {name: value for name, value in _flat(blank).items() if name in stored}
            load(flat, checkpoint_id=path)
        except (OSError, CheckpointException, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"checkpoint {path} cannot be read: {_first_line(error)}") from None
    return {group: {name: flat[f"{group}:{name}"] for name in values if f"{group}:{name}" in flat}
            for group, values in blank.items()}  # fmt: skip


def refuse_damaged(path: Path) -> None:
    """Raises UserError where a file of the parts is missing or not what was written.

    Parts of before there were checksums count as good: reading them must show it.
    """
    if not path.is_dir():
        raise UserError(f"checkpoint {path} is missing")
    listed = path / CHECKSUMS
    if not listed.exists():
        return
    try:
        sums = dict(json.loads(listed.read_bytes()))
    except OSError as error:
        raise UserError(f"checkpoint file {listed} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError):
        raise UserError(f"checkpoint file {listed} is damaged") from None
    for name, expected in sums.items():
        refuse_changed(path / name, expected)


def remove_others(folder: Path, needed: Iterable[str]) -> None:
    """Deletes the parts that no checkpoint names any more."""
    keep = set(needed)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in keep:
            shutil.rmtree(path, ignore_errors=True)


def _flat(groups: Groups) -> dict[str, Any]:
    return {f"{group}:{name}": value for group, values in groups.items() for name, value in values.items()}


def _renewed(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"checkpoint {folder} cannot be written: {error.strerror or error}") from None


def _finished(unfinished: Path, path: Path) -> None:
    try:
        sums = {str(file.relative_to(unfinished)): checksum(file) for file in unfinished.rglob("*") if file.is_file()}
        (unfinished / CHECKSUMS).write_text(json.dumps(sums), encoding="utf-8")
        for file in unfinished.rglob("*"):
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be written: {error.strerror or error}") from None


def _first_line(error: BaseException) -> str:
    causes = getattr(error, "failures", None)
    if causes:
        error = next(iter(causes.values()))[0]
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
