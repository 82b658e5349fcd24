"""Read `.pth` files, and write checkpoints of the paper authors' code.

Such a file is a dict: the tensors are under "model", the command line's settings, an argparse.Namespace, under "args".
`codebase_format` reads those of other codebases.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.schema import ModelConfig
from ..model.network import DeformableDETRNetwork
from ..utils.errors import UserError
from ..utils.files import write_files
from . import codebase_format
from .checkpoint import STATED, SUPPORTED, Checkpoint, check_supported, coco_classes, restore_own_fields, stated_fields
from .files import check_tensors, describe_choice, find_state_dict, read_pickle, strip_prefixes
from .key_mapping import official_placements, to_reference_keys

FILE = "checkpoint.pth"
OWN_CONFIG = "deformable-detr"  # key of our own config in the files that we write
_OWN_FIELDS = (
    "class_names", "category_ids", "image_size", "max_size", "pixel_mean", "pixel_std", "look_forward_twice",
    "backbone_norm", "frozen_stages", "size_divisor",
)  # fmt: skip
# torchvision's networks with the feature widths that the official code assumes; timm has them under the same names.
BACKBONES = (
    "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d",
)  # fmt: skip
_BLOCKS: dict[tuple[int, ...], str] = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"}
# Our field → the name in the official settings.
_FIELDS = {
    "num_heads": "nheads",
    "encoder_layers": "enc_layers",
    "decoder_layers": "dec_layers",
    "encoder_points": "enc_n_points",
    "decoder_points": "dec_n_points",
    "ffn_dim": "dim_feedforward",
    "position_encoding": "position_embedding",
    "refine": "with_box_refine",
} | {name: name for name in ("num_feature_levels", "hidden_dim", "dropout", "dilation", "num_queries", "two_stage")}


def read(path: Path, stated: Mapping[str, Any] | None = None) -> Checkpoint:
    """Read a checkpoint, also one of another codebase.

    stated: Config fields that the user gives, as the file cannot tell them.
    Raises UserError if it is damaged, foreign, tells too little, or holds more than tensors and settings.
    """
    values = read_pickle(path)
    if not isinstance(values, Mapping):
        raise UserError(f"{path} has no dict of tensors")
    tensors = strip_prefixes(check_tensors(find_state_dict(values), path))
    notes, stated = describe_choice(values, path), stated or {}
    if codebase := codebase_format.find_codebase(tensors):
        checkpoint = codebase_format.read(codebase, values, tensors, path, stated)
        return replace(checkpoint, notes=(*notes, *checkpoint.notes))
    config = read_config(tensors, values.get("args"), path, stated)
    saved = values.get(OWN_CONFIG)
    config = restore_own_fields(config, saved.get("model") if isinstance(saved, Mapping) else None, _OWN_FIELDS)
    return Checkpoint(config, tensors, path, "its settings", official_placements, notes=notes)


def save(model: DeformableDETRNetwork, folder: Path) -> None:
    """Write checkpoint.pth, which the official code's --resume reads.

    Raises UserError if the model has parts that the official code lacks, or the folder cannot be written.
    """
    config = model.config
    args = write_args(config)
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    tensors = to_reference_keys(state, official_placements(state, config), all_copies=True)
    values = {"model": tensors, "args": args, OWN_CONFIG: {"model": config.model_dump(mode="json")}}
    write_files(folder, {FILE: lambda path: torch.save(values, path)})


def read_config(
    tensors: Mapping[str, Tensor], args: Any, path: Path, stated: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Derive the config from the tensors' shapes, and from the settings what the shapes do not tell.

    stated: Fields that the user gives, as neither tells them.
    Raises UserError if shapes and settings contradict each other, or tell too little, or the network is not supported.
    """
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}
    settings = {key: value for key, value in args.items() if isinstance(value, str | int | float)}
    given = _given_settings(tensors, settings, path, stated or {})
    try:
        measured = _measure(tensors, int(given["nheads"]))
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path} is not a complete checkpoint of Deformable DETR: {error!s:.100}") from None
    for key, value in measured.items():
        if key in settings and settings[key] != value:
            raise UserError(f"{path}: its settings have {key} {settings[key]!r}, its tensors {value!r}")
    learned = "backbone.1.row_embed.weight" in tensors
    values = {**given, **measured, "position_embedding": "learned" if learned else "sine"}
    depths = tuple(_count(tensors, rf"backbone\.0\.body\.layer{stage}\.(\d+)\.") for stage in range(1, 5))
    backbone = settings.get("backbone") or _BLOCKS.get(depths)
    if backbone not in BACKBONES:
        raise UserError(f"{path}: backbone {backbone!r} is not supported; the official code has {', '.join(BACKBONES)}")
    names, category_ids = coco_classes(measured["num_classes"])
    return ModelConfig.from_dict(
        {
            # Where a setting is missing, the official default is ours: both are the paper's.
            **{field: values[key] for field, key in _FIELDS.items() if key in values},
            "class_names": names if len(names) == 91 else (),
            "category_ids": category_ids if len(names) == 91 else tuple(range(measured["num_classes"])),
            "num_classes": measured["num_classes"],
            "backbone": backbone,
            "backbone_weights": "none",
            "backbone_norm": "frozen",
            "frozen_stages": 2,
            "pixel_mean": (0.485, 0.456, 0.406),
            "pixel_std": (0.229, 0.224, 0.225),
        },
        str(path),
    )


def _given_settings(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], path: Path, stated: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings, completed by what the user states. Raises UserError if one is missing that no shape tells.

    Shapes tell the number of queries of one-stage models; with several levels there is no dilation.
    """
    if "transformer.level_embed" not in tensors:  # then not even the shapes are those of Deformable DETR
        return {"nheads": 1, **settings}
    one_level = len(tensors["transformer.level_embed"]) == 1
    needed = ("num_heads", *(("dilation",) if one_level else ()))
    needed += ("num_queries",) if "transformer.enc_output.weight" in tensors else ()
    told = {field: settings[_FIELDS[field]] for field in STATED if _FIELDS[field] in settings}
    stated = {field: value for field, value in stated.items() if field in needed or field in told}
    fields = stated_fields(path, told, stated, needed, {})
    return {**settings, **{_FIELDS[field]: value for field, value in fields.items()}}


def write_args(config: ModelConfig) -> argparse.Namespace:
    """Return the official code's settings for a network. Raises UserError if it cannot express the network."""
    supported = {**SUPPORTED, "activation": ("relu",), "backbone_shape": (None,)}
    check_supported(config, supported, "the official code", "two-stage")
    if config.num_feature_levels == 2:
        raise UserError("the official code does not support num_feature_levels: 2")
    backbone = config.backbone.split(".")[0]
    if backbone not in BACKBONES:
        raise UserError(f"the official code has no backbone {config.backbone!r}; it has {', '.join(BACKBONES)}")
    if config.hidden_dim % 32 or (config.two_stage and config.hidden_dim != 256):
        raise UserError("the official code needs a hidden_dim of 256, or, without two_stage, a multiple of 32")
    settings = {key: getattr(config, field) for field, key in _FIELDS.items()}
    training = {"aux_loss": True, "masks": False, "lr_backbone": 2e-5, "dataset_file": "coco"}
    return argparse.Namespace(backbone=backbone, **settings, **training)


def _measure(tensors: Mapping[str, Tensor], heads: int) -> dict[str, Any]:
    """The official settings that follow from the tensors' shapes."""
    levels, hidden_dim = tensors["transformer.level_embed"].shape
    groups = heads * levels
    two_stage = "transformer.enc_output.weight" in tensors
    measured = {
        "num_feature_levels": levels,
        "hidden_dim": hidden_dim,
        "enc_layers": _count(tensors, r"transformer\.encoder\.layers\.(\d+)\."),
        "dec_layers": _count(tensors, r"transformer\.decoder\.layers\.(\d+)\."),
        "dim_feedforward": len(tensors["transformer.decoder.layers.0.linear1.weight"]),
        "dec_n_points": len(tensors["transformer.decoder.layers.0.cross_attn.attention_weights.bias"]) // groups,
        "two_stage": two_stage,
        "num_classes": len(tensors["class_embed.0.bias"]),
        "with_box_refine": any(name.startswith("transformer.decoder.bbox_embed.") for name in tensors),
    }
    if measured["enc_layers"]:
        rows = len(tensors["transformer.encoder.layers.0.self_attn.attention_weights.bias"])
        measured["enc_n_points"] = rows // groups
    if not two_stage:
        measured["num_queries"] = len(tensors["query_embed.weight"])
    return measured


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return max((int(match[1]) for name in tensors if (match := re.match(pattern, name))), default=-1) + 1
