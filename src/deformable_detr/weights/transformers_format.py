"""Read and write transformers repositories of Deformable DETR, without the transformers library.

A repository holds config.json, model.safetensors (or shards, or pytorch_model.bin) and preprocessor_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config.schema import ModelConfig, ResNetShape
from ..model.network import DeformableDETRNetwork
from ..utils.errors import UserError
from ..utils.files import json_text, read_json, write_files
from .checkpoint import Checkpoint, default_class_names, restore_own_fields
from .files import read_repository
from .image_processor import PREPROCESSOR, read_processor, write_processor
from .key_mapping import modern_transformers_keys, to_reference_keys, transformers_placements

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE = "deformable_detr"
# Our own config is in the header of the weights file, where it cannot go stale: who rewrites the weights drops it.
METADATA = "deformable-detr"
_OWN_FIELDS = ("backbone_norm", "frozen_stages", "look_forward_twice", "size_divisor")
_MAX_CLASSES = 100_000
# Our field → the name in transformers' config.
_FIELDS = {
    "num_feature_levels": "num_feature_levels",
    "hidden_dim": "d_model",
    "num_heads": "encoder_attention_heads",
    "encoder_layers": "encoder_layers",
    "decoder_layers": "decoder_layers",
    "encoder_points": "encoder_n_points",
    "decoder_points": "decoder_n_points",
    "ffn_dim": "encoder_ffn_dim",
    "dropout": "dropout",
    "activation": "activation_function",
    "position_encoding": "position_embedding_type",
    "num_queries": "num_queries",
    "refine": "with_box_refine",
    "two_stage": "two_stage",
}
_RESNET_DEFAULTS: dict[str, Any] = {
    "num_channels": 3, "embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3],
    "layer_type": "bottleneck", "hidden_act": "relu", "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}  # fmt: skip
_TIMM_RESNETS: dict[tuple[str, tuple[int, ...]], str] = {  # (block, depths) at the usual widths
    ("basic", (2, 2, 2, 2)): "resnet18", ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (2, 2, 2, 2)): "resnet26", ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101", ("bottleneck", (3, 8, 36, 3)): "resnet152",
}  # fmt: skip
_WIDTHS = {"basic": (64, 128, 256, 512), "bottleneck": (256, 512, 1024, 2048)}


def read(folder: Path) -> Checkpoint:
    """Read a repository.

    Raises:
        UserError: It is damaged, of another architecture, or has parts that this package lacks.
    """
    path = folder / CONFIG
    values = read_json(path)
    tensors, metadata, weights_path = read_repository(folder)
    config = read_config(values, read_processor(folder), path)
    config = restore_own_fields(config, _parse_metadata(metadata), _OWN_FIELDS)
    tensors = _untie(modern_transformers_keys(tensors), config)
    placements = partial(transformers_placements, own_resnet=_backbone_type(values) == "resnet")
    return Checkpoint(config, tensors, weights_path, CONFIG, placements, partial(_check_backbone, values, path))


def save(model: DeformableDETRNetwork, folder: Path) -> None:
    """Write a repository.

    Raises:
        UserError: The model has parts that transformers lacks, or the folder cannot be written.
    """
    from safetensors.torch import save_file

    values, processor = write_config(model), write_processor(model.config)
    state = {name: value.detach() for name, value in model.state_dict().items() if "num_batches_tracked" not in name}
    placements = transformers_placements(state, model.config, _backbone_type(values) == "resnet")
    tensors = {key: value.contiguous() for key, value in to_reference_keys(state, placements, duplicates=False).items()}
    metadata = {"format": "pt", METADATA: model.config.model_dump_json()}
    write_files(
        folder,
        {
            WEIGHTS: lambda path: save_file(tensors, path, metadata=metadata),
            PREPROCESSOR: json_text(processor),
            CONFIG: json_text(values),
        },
    )


def read_config(described: Mapping[str, Any], processor_fields: Mapping[str, Any], path: Path) -> ModelConfig:
    """Translate a transformers config. Raises UserError, naming `path`, if this package has no equivalent."""
    model_type = described.get("model_type")
    if model_type != MODEL_TYPE:
        raise UserError(f"{path} is of model_type {model_type!r}; Deformable DETR is {MODEL_TYPE!r}")
    values = {key: value for key, value in described.items() if value is not None}
    values.setdefault("d_model", values.get("hidden_size", 256))
    for encoder, decoder, default in (
        ("encoder_attention_heads", "decoder_attention_heads", 8),
        ("encoder_ffn_dim", "decoder_ffn_dim", 1024),
    ):
        if values.get(encoder, default) != values.get(decoder, default):
            raise UserError(f"{path}: {encoder} and {decoder} must be equal")
    if values.get("num_channels", 3) != 3:
        raise UserError(f"{path}: num_channels is {values['num_channels']}; only 3 is supported")
    if values.get("two_stage"):
        values["num_queries"] = values.get("two_stage_num_proposals", 300)
    values["activation_function"] = _activation(values.get("activation_function", "relu"))
    names = _class_names(described, path)
    return ModelConfig.from_dict(
        {
            # Where a key is missing, transformers' default is ours: both are the paper's.
            **{field: values[key] for field, key in _FIELDS.items() if key in values},
            **_read_backbone(values, path),
            **processor_fields,
            "class_names": names,
            "category_ids": tuple(range(len(names))),
            "num_classes": len(names),
            "backbone_weights": "none",
            "backbone_norm": "frozen",
            "frozen_stages": 2,
        },
        str(path),
    )


def write_config(model: DeformableDETRNetwork) -> dict[str, Any]:
    """Return the transformers config of a model. Raises UserError if transformers lacks a part of it."""
    config = model.config
    check_parts(config)
    names = config.class_names or default_class_names(config.num_classes)
    return {
        "architectures": ["DeformableDetrForObjectDetection"],
        "model_type": MODEL_TYPE,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "backbone_config": _write_backbone(model),
        "dilation": config.dilation,
        "num_channels": 3,
        **{key: getattr(config, field) for field, key in _FIELDS.items()},
        "decoder_attention_heads": config.num_heads,
        "decoder_ffn_dim": config.ffn_dim,
        "attention_dropout": config.dropout,
        "activation_dropout": config.dropout,
        "two_stage_num_proposals": config.num_queries,
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in reversed(list(enumerate(names)))},
    }


def check_parts(config: ModelConfig) -> None:
    """Raise UserError, naming the fields, if transformers cannot express the network."""
    plain = {"pre_norm": False, "class_aware_proposals": False, "query_init": "box", "iterative_query_pos": False}
    unsupported = [
        f"{name}: {getattr(config, name)}" for name, value in plain.items() if getattr(config, name) != value
    ]
    if unsupported:
        raise UserError(
            f"transformers does not support {', '.join(unsupported)}: this model cannot be converted; fine-tune it as "
            "--preset small-portable, two-stage or another of the paper's (train --weights)"
        )
    if config.hidden_dim % 32:
        raise UserError(f"transformers needs a hidden_dim that is a multiple of 32; this model has {config.hidden_dim}")


def _class_names(described: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    id2label = described.get("id2label")
    if id2label is None:
        count = described.get("num_labels", 2)
        if not isinstance(count, int) or not 1 <= count <= _MAX_CLASSES:
            raise UserError(f"{path}: num_labels {count!r:.40} must be 1 to {_MAX_CLASSES}")
        return default_class_names(count)
    if not isinstance(id2label, dict) or not id2label:
        raise UserError(f"{path}: id2label must map labels to names")
    names: dict[int, str] = {}
    for label, name in id2label.items():
        if not label.isdecimal() or len(label) > 9 or int(label) >= _MAX_CLASSES:
            raise UserError(f"{path}: id2label has {label[:40]!r} as a label; labels are 0, 1, …")
        if not isinstance(name, str | int | float | None):
            raise UserError(f"{path}: id2label gives label {label} {str(name)[:40]} as a name")
        if name is not None:
            names[int(label)] = str(name)
    count = max(int(label) for label in id2label) + 1
    return tuple(names.get(label, default) for label, default in enumerate(default_class_names(count)))


def _activation(name: Any) -> Any:
    return "silu" if name == "swish" else name


def _backbone_type(described: Mapping[str, Any]) -> str:
    backbone = described.get("backbone_config")
    if isinstance(backbone, dict):
        return str(backbone.get("model_type", "timm_backbone" if "backbone" in backbone else "resnet"))
    return "timm_backbone" if described.get("use_timm_backbone", True) is not False else "resnet"


def _read_backbone(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    backbone_type, backbone = _backbone_type(values), values.get("backbone_config")
    if backbone is not None and not isinstance(backbone, dict):
        raise UserError(f"{path}: backbone_config is not a JSON object")
    if backbone_type == "resnet":
        if backbone is None and values.get("backbone"):
            raise UserError(f"{path}: backbone {values['backbone']!r} has no backbone_config")
        return _read_resnet(backbone or {}, path)
    if backbone_type != "timm_backbone":
        raise UserError(f"{path}: backbone of type {backbone_type!r}; supported are 'timm_backbone' and 'resnet'")
    if backbone is None:
        return {"backbone": values.get("backbone") or "resnet50", "dilation": bool(values.get("dilation"))}
    stride = backbone.get("output_stride")
    if stride not in (None, 16, 32):
        raise UserError(f"{path}: the backbone's output_stride is {stride}; supported are 32, and 16 (dilation)")
    return {"backbone": backbone.get("backbone"), "dilation": stride == 16}


def _read_resnet(backbone: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Translate the config of transformers' own ResNet: a timm model if there is the same one."""
    values = {**_RESNET_DEFAULTS, **{key: value for key, value in backbone.items() if value is not None}}
    if values["num_channels"] != 3 or values["downsample_in_first_stage"]:
        raise UserError(f"{path}: a ResNet needs num_channels 3 and downsample_in_first_stage false")
    shape = ResNetShape.from_dict(
        {
            "block": values["layer_type"],
            "depths": values["depths"],
            "widths": values["hidden_sizes"],
            "stem": values["embedding_size"],
            "activation": _activation(values["hidden_act"]),
            "stride_first": values["downsample_in_bottleneck"] and values["layer_type"] == "bottleneck",
        },
        f"{path}: backbone_config",
    )
    name = _TIMM_RESNETS.get((shape.block, shape.depths))
    if name and shape == ResNetShape(block=shape.block, depths=shape.depths, widths=_WIDTHS[shape.block]):
        return {"backbone": name}
    return {"backbone": "resnet", "backbone_shape": shape.model_dump()}


def _write_backbone(model: DeformableDETRNetwork) -> dict[str, Any]:
    config, shape = model.config, model.config.backbone_shape
    indices = list(_feature_info(model).out_indices)
    if shape is None:
        return {
            "model_type": "timm_backbone",
            "backbone": config.backbone,
            "num_channels": 3,
            "features_only": True,
            "use_pretrained_backbone": False,
            "out_indices": indices,
            "output_stride": 16 if config.dilation else None,
            # Otherwise transformers replaces batch norms by its own and loses the activations that some contain.
            "freeze_batch_norm_2d": True,
        }
    stages = ["stem", *(f"stage{index}" for index in range(1, len(shape.depths) + 1))]
    return {
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": shape.stem,
        "hidden_sizes": list(shape.widths),
        "depths": list(shape.depths),
        "layer_type": shape.block,
        "hidden_act": shape.activation,
        "downsample_in_bottleneck": shape.stride_first,
        "stage_names": stages,
        "out_indices": indices,
        "out_features": [stages[index] for index in indices],
    }


def _feature_info(model: DeformableDETRNetwork) -> Any:
    """timm's description of the backbone's feature maps."""
    return model.backbone.body.feature_info


def _check_backbone(described: Mapping[str, Any], path: Path, model: DeformableDETRNetwork) -> None:
    """Refuse a config with which transformers takes other feature maps, or computes them otherwise."""
    backbone_type, backbone = _backbone_type(described), described.get("backbone_config")
    backbone = backbone if isinstance(backbone, dict) else {}
    supported, count = list(_feature_info(model).out_indices), len(_feature_info(model).info)
    indices, features, stages = (backbone.get(key) for key in ("out_indices", "out_features", "stage_names"))
    if indices is None and isinstance(features, list) and isinstance(stages, list):
        indices = [stages.index(name) if name in stages else name for name in features]
    if indices is None and (backbone or backbone_type == "resnet"):
        indices = [-1]  # transformers' default with a backbone_config
    if indices is not None and (
        not isinstance(indices, list | tuple)
        or [index % count if isinstance(index, int) else index for index in indices] != supported
    ):
        raise UserError(f"{path}: feature maps {indices} of the backbone; only {supported} is supported at this depth")
    if backbone_type != "timm_backbone" or backbone.get("freeze_batch_norm_2d"):
        return
    for module in model.backbone.body.modules():
        activation = getattr(module, "act", None)
        if type(module).__name__.startswith("FrozenBatchNorm") and (
            module.eps != 1e-5 or not isinstance(activation, torch.nn.Identity | None)
        ):
            raise UserError(
                f"{path}: freeze_batch_norm_2d must be true for backbone '{model.config.backbone}': otherwise "
                "transformers replaces its batch norms by others that compute something else"
            )


def _parse_metadata(metadata: Mapping[str, str]) -> Any:
    try:
        return json.loads(metadata.get(METADATA, "null"))
    except (ValueError, RecursionError):
        return None


def _untie(tensors: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Repeat the class head per layer: with refinement but one stage, transformers ties them and saves the first."""
    if not config.refine or config.two_stage:
        return tensors
    for part in ("weight", "bias"):
        first, *others = (f"class_embed.{layer}.{part}" for layer in range(config.decoder_layers))
        if first in tensors and not any(key in tensors for key in others):
            tensors |= dict.fromkeys(others, tensors[first])
    return tensors
