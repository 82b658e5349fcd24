"""Read files of tensors without running any code in them."""

import argparse
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.errors import UserError, first_line
from ..utils.files import open_regular, read_json

# Keys under which checkpoints store the state dict; averaged weights come last.
_STATE_DICT_KEYS = (
    "model", "state_dict", "model_state_dict", "ema", "model_ema", "ema_model", "ema_state_dict", "ema_state",
    "state_dict_ema", "module",
)  # fmt: skip
_PREFIXES = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, Lightning


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file. Raises UserError if it is missing or damaged."""
    from safetensors import safe_open

    _check_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except Exception as error:  # a damaged file raises all kinds of errors
        raise UserError(f"{path} is damaged or not a safetensors file: {first_line(error)}") from None


def read_pickle(path: Path, classes: tuple[type, ...] = (argparse.Namespace,)) -> Any:
    """Return what torch.save wrote: tensors, numbers, strings, containers of them, and objects of `classes`.

    Raises UserError if the file is missing, damaged, or holds anything else. Nothing in it is run.
    """
    _check_readable(path)
    try:
        _refuse_compressed(path)
        with torch.serialization.safe_globals(list(classes)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged file raises all kinds of errors
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"it holds {refused[1]} beside tensors and settings; loading that could run code"
            raise UserError(f"{path} is refused: {reason}") from None
        raise UserError(f"{path} is damaged or not a PyTorch checkpoint: {first_line(error)}") from None


def describe_choice(values: Mapping[Any, Any], path: Path) -> tuple[str, ...]:
    """Return a line that says under which key `find_state_dict` finds the tensors; none if there is no key."""
    taken, *others = [key for key in _STATE_DICT_KEYS if isinstance(values.get(key), Mapping)] or [None]
    if taken is None:
        return ()
    unread = f"; those under {' and '.join(map(repr, others))} are not read" if others else ""
    return (f"{path}: took the weights under {taken!r}{unread}",)


def find_state_dict(values: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return the dict of tensors of a checkpoint that stores it under one of the usual keys."""
    for _ in range(3):  # such as {"ema": {"module": {…}}}
        inner = next((values[key] for key in _STATE_DICT_KEYS if isinstance(values.get(key), Mapping)), None)
        if inner is None:
            break
        values = inner
    return values


def strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that wrappers put before all keys."""
    for prefix in (*_PREFIXES, *_PREFIXES):  # in any order, such as "module._orig_mod."
        # "model." may be transformers' own; Lightning's stands before that, or before an official key.
        if prefix == "model." and not any(key.startswith(("model.model.", "model.transf")) for key in tensors):
            continue
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError, naming the first tensor, if one holds NaN or infinity."""
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{path}: tensor {name} has values that are NaN or infinite")


def check_tensors(values: Any, path: Path) -> dict[str, Tensor]:
    """Return a dict of tensors by key; raise UserError if it is anything else."""
    if not isinstance(values, Mapping) or not values:
        raise UserError(f"{path} has no dict of tensors")
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: {str(name)[:80]!r} is not a tensor")
        if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type != "cpu":
            raise UserError(f"{path}: {name} is not a dense tensor")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} has shape {tuple(value.shape)} but less data")
    return {name: value.detach() for name, value in values.items()}


def read_repository(folder: Path) -> tuple[dict[str, Tensor], dict[str, str], Path]:
    """Return a transformers repository's tensors, from one file or shards, their metadata and the file's path."""
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    path = next((folder / name for name in files if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} has no weights: no model.safetensors, no pytorch_model.bin, and no index of either")
    if path.suffix != ".json":
        tensors, metadata = _read_tensors(path)
        return strip_prefixes(tensors), metadata, path
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map")
    tensors, metadata = {}, {}
    for shard in sorted({str(file) for file in weight_map.values()}):
        if Path(shard).name != shard:
            raise UserError(f"{path} lists the shard {shard[:80]!r}, which is not a file in the same folder")
        shard_tensors, shard_metadata = _read_tensors(folder / shard)
        tensors |= shard_tensors
        metadata |= shard_metadata
    return strip_prefixes(tensors), metadata, path


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    values = read_pickle(path, classes=())
    return check_tensors(find_state_dict(values) if isinstance(values, Mapping) else values, path), {}


def _check_readable(path: Path) -> None:
    if not os.path.exists(path):  # unlike Path.exists, False for an invalid name
        raise UserError(f"{str(path)[:400]}: no such file")
    try:
        open_regular(path).close()
    except OSError as error:  # safetensors would call it missing, torch.load damaged
        raise UserError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from None


def _refuse_compressed(path: Path) -> None:
    """torch.save does not compress, so an archive that grows on reading may be an attempt to fill the memory."""
    with open_regular(path) as file:
        if file.read(4) != b"PK\x03\x04":  # torch.load tells the formats apart by this
            return
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > path.stat().st_size:
        raise UserError(f"{path} is refused: its entries unpack to {size} bytes, more than its own size")
