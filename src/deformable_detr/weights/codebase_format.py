"""Read checkpoints (`.pth`) of IDEA-Research/DINO, detrex and mmdetection 3, by the names and shapes of their tensors.

What these do not tell is the same in all configs of a codebase, is in the settings beside the tensors, or is asked for.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.schema import ModelConfig
from ..utils.errors import UserError
from . import codebase_keys
from .checkpoint import Checkpoint, coco_classes, stated_fields
from .key_mapping import Placements, translate

_RESNETS: dict[tuple[int, ...], str] = {
    (3, 4, 6, 3): "resnet50",
    (3, 4, 23, 3): "resnet101",
    (3, 8, 36, 3): "resnet152",
}
# (embedding dimension, blocks of the third stage, window) → timm's name
_SWINS = {
    (96, 6, 7): "swin_tiny_patch4_window7_224",
    (96, 18, 7): "swin_small_patch4_window7_224",
    (128, 18, 7): "swin_base_patch4_window7_224",
    (128, 18, 12): "swin_base_patch4_window12_384",
    (192, 18, 7): "swin_large_patch4_window7_224",
    (192, 18, 12): "swin_large_patch4_window12_384",
}


@dataclass(frozen=True)
class Codebase:
    """How a codebase names tensors, and what is the same in all of its configs.

    Attributes:
        name: For messages.
        marker: Key that only its checkpoints have.
        keys: Our key prefix → its.
        placements: Returns where our tensors are among its.
        box_eps: The config field, for DINO and for other models.
    """

    name: str
    marker: str
    keys: Mapping[str, str]
    placements: Callable[[Iterable[str], ModelConfig], Placements]
    box_eps: tuple[tuple[float, float], tuple[float, float]]


CODEBASES = (
    Codebase(
        "detrex", "neck.convs.0.norm.weight", codebase_keys.DETREX_KEYS, codebase_keys.detrex_placements,
        ((1e-3, 1e-3), (1e-3, 1e-3)),
    ),
    Codebase(
        "mmdetection", "bbox_head.cls_branches.0.weight", codebase_keys.MMDET_KEYS, codebase_keys.mmdet_placements,
        ((1e-5, 1e-3), (1e-5, 1e-5)),
    ),
    Codebase(
        "IDEA-Research/DINO", "transformer.enc_out_class_embed.weight", codebase_keys.DINO_KEYS,
        codebase_keys.dino_placements, ((1e-3, 1e-3), (1e-3, 1e-3)),
    ),
)  # fmt: skip


def find_codebase(tensors: Mapping[str, Tensor]) -> Codebase | None:
    """Return the codebase that a checkpoint is from; None: none of these."""
    return next((codebase for codebase in CODEBASES if codebase.marker in tensors), None)


def read(
    codebase: Codebase, values: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path, stated: Mapping[str, Any]
) -> Checkpoint:
    """Read a checkpoint. Raises UserError if it is damaged, has parts that this package lacks, or tells too little.

    Args:
        codebase: Where it is from.
        values: The contents of the file.
        tensors: Those of the network among them.
        path: The file.
        stated: Config fields that the user gives, as the file cannot tell them.
    """
    unused = [key for key in codebase_keys.TRAINING_ONLY if key in tensors]
    tensors = {k: v for k, v in tensors.items() if k not in unused and not k.endswith(codebase_keys.COMPUTED)}
    try:
        config = _read_config(codebase, values, tensors, path, stated)
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path} is not a complete checkpoint of {codebase.name}: {error!s:.100}") from None
    notes = tuple(f"{path}: {key}, which only training reads, is left out" for key in unused)
    tensors = codebase_keys.to_our_form(tensors, from_mmdet=codebase.name == "mmdetection")
    description = f"the network of {codebase.name} that its tensors describe"
    return Checkpoint(config, tensors, path, description, codebase.placements, notes=notes)


def _read_config(
    codebase: Codebase, values: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path, stated: Mapping[str, Any]
) -> ModelConfig:
    settings = _settings(values, path)
    get = _Lookup(codebase, tensors)
    levels, hidden_dim = get["level_embedding"].shape
    refine = _is_refined(get)
    two_stage = "proposals.memory_proj.weight" in get
    is_dino = "decoder.norm.weight" in get
    is_dab = "decoder.position_head.scale.layers.0.weight" in get
    embeddings = ("proposals.query_embedding.weight", "query_boxes.weight", "query_embedding.weight")
    queries = next((get[name] for name in embeddings if name in get), None)
    told = {key: settings[key] for key in ("num_heads", "position_encoding") if key in settings}
    told |= {} if levels == 1 else {"dilation": False}
    told |= {} if queries is None else {"num_queries": len(queries)}
    defaults = {"position_encoding": "dino" if is_dino and codebase.name != "detrex" else "sine"}
    told |= stated_fields(path, told, stated, ("num_heads", "dilation", "num_queries"), defaults)
    rows = told["num_heads"] * levels
    points = {
        f"{part}_points": len(get[f"{part}.layers.0.{layer}.attention_weights.bias"]) // rows
        for part, layer in (("encoder", "self_attn"), ("decoder", "cross_attn"))
    }
    projections = [f"projections.levels.{level}.0.weight" for level in range(levels)]
    own_levels = sum(name in get and get[name].shape[-1] == 1 for name in projections)  # others have 3×3 kernels
    num_classes = len(get["decoder.heads.classes.0.bias"])
    names, category_ids = settings.get("classes") or coco_classes(num_classes)
    query_init = "box" if "proposals.query_proj.weight" in get or not two_stage else "encoder"
    backbone = _backbone(get, path)
    return ModelConfig.from_dict(
        {
            **told,
            **points,
            "num_feature_levels": levels,
            "finest_stride": 4 if own_levels == 4 else 8,
            "hidden_dim": hidden_dim,
            "encoder_layers": get.count("encoder.layers.{}.norm1.weight"),
            "decoder_layers": get.count("decoder.layers.{}.norm1.weight"),
            "ffn_dim": len(get["decoder.layers.0.ffn.linear1.bias"]),
            "dropout": 0.0 if is_dino or is_dab else 0.1,
            "refine": refine,
            "two_stage": two_stage,
            "class_aware_proposals": two_stage and (is_dino or is_dab),
            "query_init": "learned" if two_stage and queries is not None else query_init,
            "iterative_query_pos": "dab" if is_dab else "dino" if is_dino else False,
            "decoder_norm": is_dino,
            "look_forward_twice": is_dino,
            "box_eps": codebase.box_eps[0 if is_dino else 1],
            "num_classes": num_classes,
            "class_names": names,
            "category_ids": category_ids,
            "backbone": backbone,
            "backbone_weights": "none",
            "backbone_norm": "frozen",
            "frozen_stages": 2 if backbone in _RESNETS.values() else 0,
            "pixel_mean": (0.485, 0.456, 0.406),
            "pixel_std": (0.229, 0.224, 0.225),
        },
        str(path),
    )


class _Lookup:
    """The tensors of a checkpoint by our names."""

    def __init__(self, codebase: Codebase, tensors: Mapping[str, Tensor]) -> None:
        self.codebase, self.keys, self.tensors = codebase, codebase.keys, tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[translate(name, self.keys, "this format")]

    def __contains__(self, name: str) -> bool:
        try:
            return translate(name, self.keys, "this format") in self.tensors
        except UserError:
            return False

    def count(self, name: str) -> int:
        """Return how many indices from 0 on a name with a gap has."""
        index = 0
        while name.format(index) in self:
            index += 1
        return index


def _is_refined(get: _Lookup) -> bool:
    """Whether each decoder layer has box heads of its own, or shares them but passes its boxes on."""
    if get.codebase.name != "mmdetection":
        return "transformer.decoder.bbox_embed.0.layers.0.weight" in get.tensors
    first, second = (f"decoder.heads.boxes.{i}.layers.0.weight" for i in range(2))
    return second in get and not torch.equal(get[first], get[second])


def _backbone(get: _Lookup, path: Path) -> str:
    depths = tuple(get.count(f"backbone.body.layer{stage}.{{}}.conv3.weight") for stage in range(1, 5))
    if name := _RESNETS.get(depths):
        return name
    table = "backbone.body.layers_0.blocks.0.attn.relative_position_bias_table"
    if table in get:
        window = (round(len(get[table]) ** 0.5) + 1) // 2
        blocks = get.count("backbone.body.layers_2.blocks.{}.norm1.weight")
        shape = (len(get["backbone.body.patch_embed.proj.weight"]), blocks, window)
        if shape in _SWINS:
            return _SWINS[shape]
    names = ", ".join((*_RESNETS.values(), *_SWINS.values()))
    raise UserError(f"{path} has a backbone that is not supported here; these are: {names}")


def _settings(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what the settings beside the tensors tell: config fields, and "classes" as names and category ids."""
    args, meta = values.get("args"), values.get("meta")
    settings: dict[str, Any] = {}
    args = args if isinstance(args, Mapping) else getattr(args, "__dict__", {})
    if isinstance(args.get("nheads"), int):
        settings["num_heads"] = args["nheads"]
    temperatures = {args.get(f"pe_temperature{axis}", 20) for axis in "HW"}
    required = {
        "pe_temperatureH and W 20": temperatures == {20},
        "pre_norm False": not args.get("pre_norm"),
        "transformer_activation 'relu'": args.get("transformer_activation", "relu") == "relu",
        "decoder_module_seq ['sa', 'ca', 'ffn']": args.get("decoder_module_seq") in (None, ["sa", "ca", "ffn"]),
        "dec_layer_number None": args.get("dec_layer_number") is None,
    }
    if other := [name for name, holds in required.items() if not holds]:
        raise UserError(f"{path}: its settings differ from {other[0]}, the only ones that this package reads")
    meta = meta if isinstance(meta, Mapping) else {}
    text = meta.get("cfg")
    if isinstance(text, str):
        heads = {int(number) for number in re.findall(r"\bnum_heads=(\d+)", text)}
        settings |= {"num_heads": heads.pop()} if len(heads) == 1 else {}
        encoding = re.search(r"positional_encoding=dict\(([^)]*)\)", text)
        kind = {key: float(value) for key, value in re.findall(r"(\w+)=(-?[\d.]+)", encoding[1] if encoding else "")}
        known = {(20.0, 0.0): "dino", (10000.0, -0.5): "sine"}
        pair = (kind.get("temperature", 10000.0), kind.get("offset", 0.0))
        if encoding and pair not in known:
            raise UserError(f"{path}: its positional_encoding has temperature {pair[0]:g} and offset {pair[1]:g}")
        settings |= {"position_encoding": known[pair]} if encoding else {}
    described = meta.get("dataset_meta")
    names = (described if isinstance(described, Mapping) else {}).get("classes", meta.get("CLASSES"))
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        coco_names, ids = coco_classes(len(names))
        settings["classes"] = (tuple(names), ids if tuple(names) == coco_names else tuple(range(len(names))))
    return settings
