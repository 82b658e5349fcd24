"""Refuse a config.json that would make transformers exhaust the memory, or load code or configs from the hub."""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm

from ..utils.errors import UserError
from ..utils.files import open_regular

_MAX_LAYERS, _MAX_SIDE, _MAX_SIZE = 1000, 2**15, 100_000
_FLOOR = 2048  # sizes up to here need no tensor of that size: queries, positions
_DEPTHS = "layers", "depth", "blocks"
_ATTENTION = None, "eager", "sdpa"
_MAX_HEADER = 100 * 2**20


def check_config(values: Mapping[str, Any], path: Path) -> None:
    """Raise UserError, naming the key, if transformers is not to build what config.json asks for."""
    for file in path.parent.iterdir():
        if file.exists() and not (file.is_file() or file.is_dir()):  # it could block transformers
            raise UserError(f"{file} cannot be read: not a regular file")
    tensors, largest = _tensor_sizes(path.parent)
    for key, value in _settings(values):
        name = key.rpartition(".")[2]
        if "attn_implementation" in key:
            if value not in _ATTENTION:
                raise UserError(f"{path}: {key} {value!r} is not supported; use eager or sdpa")
        elif isinstance(value, int) and "temperature" not in name and value > (limit := _limit(name, tensors, largest)):
            raise UserError(f"{path}: {key} {value} is more than {limit}, too much for the weights beside it")
    if values.get("return_dict") is False:
        raise UserError(f"{path}: return_dict false is not supported; remove it")
    backbone, own_resnet = values.get("backbone"), not values.get("use_timm_backbone", True)
    # Only Deformable DETR takes a name as timm's; otherwise transformers looks it up on the hub.
    looked_up = values.get("model_type") != "deformable_detr" or own_resnet or values.get("backbone_kwargs")
    if backbone is not None and not values.get("backbone_config") and (looked_up or not _is_timm(backbone)):
        raise UserError(f"{path}: backbone {backbone!r} needs a backbone_config that describes it")
    _check_labels(values, path)


def check_timm(backbone: Any, path: Path) -> None:
    """Refuse a timm backbone by a name that timm does not know: it might be an address to download code from."""
    name = getattr(backbone, "backbone", None)
    if getattr(backbone, "model_type", None) == "timm_backbone" and not _is_timm(name):
        raise UserError(f"{path}: backbone {name!r} is not a timm model")


def _is_timm(name: object) -> bool:
    return timm.is_model(str(name))


def _check_labels(values: Mapping[str, Any], path: Path) -> None:
    labels = values.get("id2label")
    if labels is None:
        return
    if not isinstance(labels, Mapping) or {str(label) for label in labels} != {str(i) for i in range(len(labels))}:
        raise UserError(f"{path}: id2label must map the labels 0, 1, … without gaps to names")


def _settings(values: object, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each number and text of nested settings with its key."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            if name not in ("id2label", "label2id", "deformable_detr"):
                yield from _settings(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        if len(values) > _MAX_LAYERS:
            yield key, len(values) * _MAX_SIZE
        for value in values:
            yield from _settings(value, key)
    else:
        yield key, values


def _limit(name: str, tensors: int | None, largest: int | None) -> int:
    """Return the largest value of a setting: a layer has a tensor, and a width is a side of one."""
    if any(word in name for word in _DEPTHS):
        return min(_MAX_LAYERS, _MAX_LAYERS if tensors is None else tensors)
    if "image_size" in name:
        return _MAX_SIDE
    return min(_MAX_SIZE, _MAX_SIZE if largest is None else max(_FLOOR, largest))


def _tensor_sizes(folder: Path) -> tuple[int | None, int | None]:
    """Return the number of tensors and the largest side of one in a folder's safetensors files; None without such."""
    count, largest = 0, 0
    paths = sorted(folder.glob("*.safetensors"))
    for path in paths:
        try:
            with open_regular(path) as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, _MAX_HEADER)))
            shapes = [value["shape"] for name, value in header.items() if name != "__metadata__"]
            largest = max(largest, *(side for shape in shapes for side in shape), 0)
        except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError, RecursionError):
            return None, None  # transformers names the damage
        count += len(shapes)
    return (count, largest) if paths else (None, None)
