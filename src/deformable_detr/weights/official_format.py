"""Checkpoints of the paper authors' code (`.pth`), read and written.

Such a file is a dict with the tensors in "model" and the command line's settings, an argparse.Namespace, in "args".
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.schema import ModelConfig
from ..model.network import DeformableDETRNetwork, N
from ..utils.errors import UserError
from ..utils.files import write_files
from .coco_names import COCO_91
from .files import read_pickle, tensors_only, unwrapped, without_prefix
from .key_mapping import check_sizes, gather, official_places, spread

FILE = "checkpoint.pth"
OWN = "deformable-detr"  # key of our own config in the files that we write
_OWN_FIELDS = ("class_names", "category_ids", "image_size", "max_size", "pixel_mean", "pixel_std", "look_forward_twice",
               "backbone_norm", "frozen_stages", "size_divisor")  # fmt: skip
# torchvision's networks with the widths that the official code counts on; timm calls them the same.
_BACKBONES = ("resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d",
              "resnext101_32x8d", "resnext101_64x4d")  # fmt: skip
_BLOCKS: dict[tuple[int, ...], str] = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"}
_IMAGENET = {"pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}


def load(path: Path, network_class: type[N] = DeformableDETRNetwork) -> tuple[ModelConfig, dict[str, Tensor], N]:
    """The config, our tensors and a model in their shape that does not hold them yet.

    Raises UserError for a broken file, one that holds more than tensors and settings, and one of another network.
    """
    values = read_pickle(path)
    if not isinstance(values, Mapping):
        raise UserError(f"{path} holds no dict of tensors")
    tensors = without_prefix(tensors_only(unwrapped(values), path))
    if "transformer.level_embed" not in tensors:
        raise UserError(f"{path} is no checkpoint of Deformable DETR: it has no transformer.level_embed")
    config = read_config(tensors, values.get("args"), path)
    config = _with_own_fields(config, values.get(OWN))
    check_sizes(config, tensors, path)
    model = network_class(config)
    own = model.state_dict()
    return config, gather(tensors, official_places(own, config), own, str(path), "its own settings"), model


def save(model: DeformableDETRNetwork, folder: Path) -> None:
    """Writes checkpoint.pth, which the official code's --resume takes.

    Raises UserError for a model with parts that the official code lacks, and where the folder cannot be written.
    """
    config = model.config
    described = write_args(config)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    places = official_places(state, config)
    tensors = {name: value.cpu().contiguous() for name, value in spread(state, places, copies=True).items()}
    values = {"model": tensors, "args": described, OWN: {"model": config.model_dump(mode="json")}}
    write_files(folder, {FILE: lambda path: torch.save(values, path)})


def read_config(tensors: Mapping[str, Tensor], args: Any, path: Path) -> ModelConfig:
    """Our config of a checkpoint: sizes as the tensors have them, the rest as its settings say.

    Raises UserError where the two contradict each other.
    """
    given = args if isinstance(args, Mapping) else vars(args) if isinstance(args, argparse.Namespace) else {}
    said = {key: value for key, value in given.items() if isinstance(value, str | int | float)}
    try:
        found = _measured(tensors, said)
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path} is no whole checkpoint of Deformable DETR: {error!s:.100} is missing or odd") from None
    for key, value in found.items():
        if key in said and said[key] != value:
            raise UserError(f"{path}: its settings say {key} {said[key]!r}, its tensors {value!r}")
    backbone = said.get("backbone") or _backbone(tensors)
    if backbone not in _BACKBONES:
        raise UserError(f"{path}: backbone {backbone!r}; the official code has {', '.join(_BACKBONES)}")
    classes = found.pop("num_classes")
    return ModelConfig.from_dict(
        {
            "class_names": COCO_91 if classes == len(COCO_91) else (),
            "category_ids": tuple(range(classes)),
            "num_classes": classes,
            "backbone": backbone,
            "backbone_weights": "none",
            "backbone_norm": "frozen",
            "frozen_stages": 2,
            "dilation": bool(said.get("dilation", False)),
            "num_feature_levels": found["num_feature_levels"],
            **_IMAGENET,
            "hidden_dim": found["hidden_dim"],
            "num_heads": said.get("nheads", 8),
            "encoder_layers": found["enc_layers"],
            "decoder_layers": found["dec_layers"],
            "encoder_points": found["enc_n_points"],
            "decoder_points": found["dec_n_points"],
            "ffn_dim": found["dim_feedforward"],
            "dropout": said.get("dropout", 0.1),
            "position_encoding": "learned" if "backbone.1.row_embed.weight" in tensors else "sine",
            "num_queries": found.get("num_queries", said.get("num_queries", 300)),
            "refine": found["with_box_refine"],
            "two_stage": found["two_stage"],
        },
        str(path),
    )


def write_args(config: ModelConfig) -> argparse.Namespace:
    """The official code's settings for a model. Raises UserError for what it has no setting for."""
    lacking = {
        "pre_norm": config.pre_norm,
        "activation": config.activation != "relu",
        "class_aware_proposals": config.class_aware_proposals,
        "query_init": config.query_init != "box",
        "iterative_query_pos": config.iterative_query_pos,
        "backbone_shape": config.backbone_shape is not None,
        "num_feature_levels": config.num_feature_levels == 2,
    }
    found = [f"{field}: {getattr(config, field)}" for field, there in lacking.items() if there]
    if found:
        raise UserError(
            f"the official code has no model with {', '.join(found)}; "
            "train with --preset two-stage, or another of the paper's, for one that can be converted"
        )
    if config.backbone.split(".")[0] not in _BACKBONES:
        raise UserError(f"the official code has no backbone {config.backbone!r}; it has {', '.join(_BACKBONES)}")
    if config.hidden_dim % 32 or (config.two_stage and config.hidden_dim != 256):
        wanted = "is 256 with two_stage" if config.two_stage else "is a multiple of 32"
        raise UserError(f"the official code's hidden_dim {wanted}; this model's is {config.hidden_dim}")
    return argparse.Namespace(
        backbone=config.backbone.split(".")[0],
        dilation=config.dilation,
        position_embedding=config.position_encoding,
        num_feature_levels=config.num_feature_levels,
        enc_layers=config.encoder_layers,
        dec_layers=config.decoder_layers,
        dim_feedforward=config.ffn_dim,
        hidden_dim=config.hidden_dim,
        dropout=config.dropout,
        nheads=config.num_heads,
        num_queries=config.num_queries,
        enc_n_points=config.encoder_points,
        dec_n_points=config.decoder_points,
        with_box_refine=config.refine,
        two_stage=config.two_stage,
        aux_loss=True,
        masks=False,
        lr_backbone=2e-5,
        dataset_file="coco",
    )


def _measured(tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> dict[str, Any]:
    """What the tensors' shapes tell, under the official names of the settings."""
    levels, width = tensors["transformer.level_embed"].shape
    heads = int(said.get("nheads", 8))
    two_stage = "transformer.enc_output.weight" in tensors
    found = {
        "num_feature_levels": levels,
        "hidden_dim": width,
        "enc_layers": _count(tensors, r"transformer\.encoder\.layers\.(\d+)\."),
        "dec_layers": _count(tensors, r"transformer\.decoder\.layers\.(\d+)\."),
        "dim_feedforward": len(tensors["transformer.decoder.layers.0.linear1.weight"]),
        "dec_n_points": _points(tensors, "decoder.layers.0.cross_attn", heads * levels),
        "two_stage": two_stage,
        "num_classes": len(tensors["class_embed.0.bias"]),
        "with_box_refine": any(name.startswith("transformer.decoder.bbox_embed.") for name in tensors),
    }
    found["enc_n_points"] = (
        _points(tensors, "encoder.layers.0.self_attn", heads * levels)
        if found["enc_layers"]
        else int(said.get("enc_n_points", 4))
    )
    if not two_stage:
        found["num_queries"] = len(tensors["query_embed.weight"])
    return found


def _points(tensors: Mapping[str, Tensor], attention: str, groups: int) -> int:
    rows = len(tensors[f"transformer.{attention}.attention_weights.bias"])
    if rows % groups:
        raise ValueError(f"the number of points in {attention}")
    return rows // groups


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    found = [int(match[1]) for name in tensors if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def _backbone(tensors: Mapping[str, Tensor]) -> str | None:
    """The plain ResNet with as many blocks as the checkpoint's."""
    depths = tuple(_count(tensors, rf"backbone\.0\.body\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    return _BLOCKS.get(depths)


def _with_own_fields(config: ModelConfig, described: Any) -> ModelConfig:
    """The config with what the official settings do not hold, where we wrote the file."""
    if not isinstance(described, Mapping) or not isinstance(described.get("model"), Mapping):
        return config
    try:
        own = ModelConfig.from_dict(described["model"]).without_pretrained_backbone()
        return config.replace(**{field: getattr(own, field) for field in _OWN_FIELDS})
    except UserError:
        return config  # written by another release, or of other classes; all that it adds is convenience
