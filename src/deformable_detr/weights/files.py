"""Files of tensors, read without running anything that is in them, and written whole or not at all."""

from __future__ import annotations

import argparse
import errno
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.errors import UserError, first_line
from ..utils.files import read_json

_WRAPPED = ("model", "state_dict", "model_state_dict", "ema", "model_ema", "ema_state_dict", "state_dict_ema", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, Lightning


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata. Raises UserError for a missing or broken file."""
    from safetensors import SafetensorError, safe_open

    _refuse_unreadable(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (
        SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError, OverflowError,
        MemoryError,
    ) as error:  # fmt: skip
        raise UserError(f"{path} is broken or no safetensors file: {first_line(error)}") from None


def read_pickle(path: Path, classes: tuple[type, ...] = (argparse.Namespace,)) -> Any:
    """What torch.save wrote: tensors, numbers, strings and containers of them, and objects of `classes`.

    Nothing else is let through and nothing in the file is run. Raises UserError for a missing, broken or other file.
    """
    _refuse_unreadable(path)
    try:
        _refuse_swollen(path)
        with torch.serialization.safe_globals(list(classes)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of formats that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        if "global" in str(error).lower():
            raise UserError(
                f"{path} is refused: it holds more than tensors and settings ({_forbidden(error)}), "
                "and reading that would run code of whoever wrote the file"
            ) from None
        raise UserError(f"{path} is broken or no PyTorch checkpoint: {first_line(error)}") from None
    except Exception as error:  # damage shows as anything at all; whatever is raised, it is the file that is wrong
        raise UserError(f"{path} is broken or no PyTorch checkpoint: {first_line(error)}") from None


def _refuse_unreadable(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not os.access(path, os.R_OK):  # safetensors calls it missing, torch.load broken
        raise UserError(f"{path} cannot be read: {os.strerror(errno.EACCES)}; make it readable")


def _refuse_swollen(path: Path) -> None:
    """torch.save stores without compression: what grows on reading is no checkpoint, and may fill the memory."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # as torch.load tells the formats apart
            return
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > path.stat().st_size:
        raise UserError(f"{path} is refused: it says it holds {size} bytes, more than its own size")


def unwrapped(values: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The dict of tensors in a checkpoint that keeps it under one of the usual names, averaged weights last."""
    for _ in range(3):  # such as {"ema": {"module": {…}}}
        inner = next((values[key] for key in _WRAPPED if isinstance(values.get(key), Mapping)), None)
        if inner is None:
            break
        values = inner
    return values


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what wrappers put before all of their names."""
    while tensors:
        wrapped = [prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in tensors)]
        # "model." may be transformers' own; Lightning's stands before that, or before an official name.
        if wrapped == ["model."] and not any(name.startswith(("model.model.", "model.transf")) for name in tensors):
            wrapped = []
        if not wrapped:
            break
        tensors = {name.removeprefix(wrapped[0]): value for name, value in tensors.items()}
    return tensors


def tensors_only(values: Any, path: Path) -> dict[str, Tensor]:
    """A dict of tensors by name, checked to be one."""
    if not isinstance(values, Mapping) or not values:
        raise UserError(f"{path} holds no dict of tensors")
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: {str(name)[:80]!r} is no tensor")
        if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type != "cpu":
            raise UserError(f"{path}: {name} is not a dense tensor")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} has shape {tuple(value.shape)} but less data")
    return {name: value.detach() for name, value in values.items()}


def read_repository(folder: Path) -> tuple[dict[str, Tensor], dict[str, str], Path]:
    """All tensors of a transformers repository, in one file or in shards, with the metadata and the file's name."""
    for name in (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ):
        path = folder / name
        if path.is_file():
            break
    else:
        raise UserError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, nor their index")
    if path.suffix != ".json":
        tensors, metadata = _read_tensors(path)
        return without_prefix(tensors), metadata, path
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{path} has no weight_map")
    for shard in sorted({str(file) for file in listed.values()}):
        if Path(shard).name != shard or shard in ("", ".", "..") or len(shard) > 255 or "\0" in shard:
            raise UserError(f"{path} names the shard {shard[:80]!r}, which is not a file beside it")
        found, about = _read_tensors(folder / shard)
        tensors |= found
        metadata |= about
    absent = sorted(set(listed) - tensors.keys())
    if absent:
        raise UserError(f"{path} lists {absent[0]}, which is in none of its shards")
    return without_prefix(tensors), metadata, path


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    values = read_pickle(path, classes=())
    return tensors_only(unwrapped(values) if isinstance(values, Mapping) else values, path), {}


def _forbidden(error: Exception) -> str:
    words = str(error).replace("`", " ").split()
    dotted = [word.strip(".,:'\"()") for word in words if "." in word.strip(".,:'\"()") and "/" not in word]
    names = [
        word for word in dotted if not word.startswith(("torch.serialization", "torch.load", "2.", "weights_only"))
    ]
    return names[0] if names else "an object of another program"
