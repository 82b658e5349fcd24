"""A model from wherever its weights are: our folder, a transformers repository, the hub, an official checkpoint."""

from __future__ import annotations

import os
import re
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from ..config.schema import ModelConfig
from ..model.network import DeformableDETRNetwork, N
from ..utils.errors import UserError, first_line
from ..utils.files import read_json
from . import native, official_format, transformers_format
from .resize import resized

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_HUB_FILES = (("*.json", "*.safetensors"), ("*.json", "pytorch_model*.bin", "*.pth"))  # pickles only where need be
# Settings that may differ from the source's: they do not decide what the weights mean.
FREE = ("image_size", "max_size", "num_queries", "num_feature_levels", "dropout", "gradient_checkpointing",
        "class_names", "category_ids", "pixel_mean", "pixel_std", "frozen_stages")  # fmt: skip


def load(source: str | os.PathLike[str], network_class: type[N] = DeformableDETRNetwork, **changes: Any) -> N:
    """The model of a source in evaluation mode, in float32, or float64 where all its weights are.

    source: a run folder or a folder that `save_pretrained` wrote; a transformers repository of Deformable DETR, as a
        folder or by its hub id ("owner/name", "owner/name@revision"); an official checkpoint (`.pth`).
    changes: settings of `ModelConfig` that should differ: any of `FREE`. num_queries of a one-stage model and
        num_feature_levels can only shrink here, since what they would add was never trained; `load_for_training` adds.

    Raises UserError, one line, for a source that is missing, foreign, broken or unsafe to read, and for a change that
    has no meaning.
    """
    unknown = [key for key in changes if key not in FREE]
    if unknown:
        raise UserError(f"{unknown[0]} of a trained model cannot be changed on loading; what can: {', '.join(FREE)}")
    config, state, model = read(source, network_class)
    if changes:
        changed = config.replace(**changes)
        if changed.num_feature_levels > config.num_feature_levels or (
            not config.two_stage and changed.num_queries > config.num_queries
        ):
            what = "num_feature_levels" if changed.num_feature_levels > config.num_feature_levels else "num_queries"
            raise UserError(
                f"{source} has {what} {getattr(config, what)}; more would be untrained: "
                "train them with `deformable-detr train DATA --weights SOURCE`"
            )
        model = network_class(changed.without_pretrained_backbone())
        state, _ = resized(state, config, model)
    return filled(model, state)


def read(
    source: str | os.PathLike[str], network_class: type[N] = DeformableDETRNetwork
) -> tuple[ModelConfig, dict[str, Tensor], N]:
    """Config, tensors in our names and an empty model in their shape. Raises UserError as `load` does."""
    path = locate(source)
    if path.is_dir():
        if read_json(path / "config.json").get("format") == native.FORMAT:
            return native.read(path, network_class)
        return transformers_format.load(path, network_class)
    return official_format.load(path, network_class)


def filled(model: N, state: dict[str, Tensor]) -> N:
    """The model with the tensors in it, in evaluation mode; float64 where all of them are."""
    floats = [value for value in state.values() if value.is_floating_point()]
    if floats and all(value.dtype == torch.float64 for value in floats):
        model = model.double()
    model.load_state_dict(state)
    return model.eval()


def locate(source: str | os.PathLike[str]) -> Path:
    """The folder or the official checkpoint that a source names; what is on the hub is fetched."""
    from ..utils.files import is_exported

    path = Path(source)
    if len(os.fspath(path)) > 4096 or any(len(part) > 255 or "\0" in part for part in path.parts):
        raise UserError(f"model {os.fspath(path)[:80]!r}…: no path and no hub id is as long or has such characters")
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        checkpoints = sorted(path.glob("*.pth"))
        if len(checkpoints) == 1:
            return checkpoints[0]
        if ((path / "config.yaml").is_file() and (path / "checkpoints").is_dir()) or (path / "metrics.jsonl").is_file():
            raise UserError(
                f"model {path}: this run has none yet, it ended before its first evaluation; "
                "go on with it: train --resume"
            )
        raise UserError(f"model {path}: no config.json there" + (", and several .pth" if checkpoints else ""))
    if path.is_file():
        if is_exported(path):
            raise UserError(f"model {path}: an exported file is no model any more; give the folder it was made of")
        if path.suffix in (".safetensors", ".bin", ".json") and (path.parent / "config.json").is_file():
            return path.parent
        if path.suffix == ".safetensors":
            raise UserError(f"{path} has no config.json beside it, which says what network the weights are of")
        return path
    named = os.fspath(source)
    # A name beside other things that are here is a path that was mistyped; the network is not asked for it.
    if _HUB_ID.fullmatch(named) and path.suffix not in (".pth", ".safetensors", ".bin") and not path.parent.is_dir():
        return _fetched(named)
    raise UserError(f"model {source}: no such folder or file")


def _fetched(source: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    for files in _HUB_FILES:
        try:
            fetched = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(files)))
        except Exception as error:  # whatever the hub's client, the network or the disk raise
            line = first_line(error)
            line = shorten(line, 300, placeholder=" …")
            raise UserError(f"model {source}: no such folder, and not to be had from the hub: {line}") from None
        if any(file.suffix in (".safetensors", ".bin", ".pth") for file in fetched.iterdir()):
            break
    return locate(fetched)
