"""Read and write transformers repositories of Deformable DETR, without the transformers library.

A repository holds config.json, model.safetensors (or shards, or pytorch_model.bin) and preprocessor_config.json.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config.schema import ModelConfig, ResNetShape
from ..model.backbone import Backbone, pixel_statistics
from ..model.network import DeformableDETRNetwork
from ..utils.errors import UserError
from ..utils.files import json_text, read_json, write_files
from .checkpoint import SUPPORTED, Checkpoint, check_supported, default_class_names, restore_own_fields
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
_SAME_FIELDS = ("num_feature_levels", "encoder_layers", "decoder_layers", "dropout", "num_queries", "two_stage")
_FIELDS = {
    "hidden_dim": "d_model",
    "num_heads": "encoder_attention_heads",
    "encoder_points": "encoder_n_points",
    "decoder_points": "decoder_n_points",
    "ffn_dim": "encoder_ffn_dim",
    "activation": "activation_function",
    "position_encoding": "position_embedding_type",
    "refine": "with_box_refine",
} | {name: name for name in _SAME_FIELDS}
_RESNET_FIELDS = {
    "block": "layer_type",
    "depths": "depths",
    "widths": "hidden_sizes",
    "stem": "embedding_size",
    "activation": "hidden_act",
    "stride_first": "downsample_in_bottleneck",
}


def read(folder: Path) -> Checkpoint:
    """Read a repository. Raises UserError if it is damaged, foreign, or has parts that this package lacks."""
    path = folder / CONFIG
    values = read_json(path)
    tensors, metadata, weights_path = read_repository(folder)
    config = read_config(values, read_processor(folder), path)
    with suppress(ValueError, RecursionError):  # as `restore_own_fields` ignores what it cannot read
        config = restore_own_fields(config, json.loads(metadata.get(METADATA, "null")), _OWN_FIELDS)
    tensors = _untie(modern_transformers_keys(tensors), config)
    placements = partial(transformers_placements, own_resnet=_backbone_type(values) == "resnet")
    return Checkpoint(config, tensors, weights_path, CONFIG, placements, partial(_check_backbone, values, path))


def check_network(folder: Path) -> None:
    """Raise UserError if config.json asks for parts that `DeformableDETRNetwork` lacks, or cannot be read."""
    path = folder / CONFIG
    values = read_json(path)
    config = read_config(values, {}, path)
    if config.backbone_shape is None:  # of a shape of any size, nothing is built before the tensors are read
        with torch.device("meta"):
            _check_backbone(values, path, Backbone(config))


def save(model: DeformableDETRNetwork, folder: Path) -> None:
    """Write a repository. Raises UserError if transformers lacks parts of the model, or writing fails."""
    from safetensors.torch import save_file

    values, config = write_config(model), model.config
    state = {name: value.detach() for name, value in model.state_dict().items() if "num_batches_tracked" not in name}
    placements = transformers_placements(state, config, _backbone_type(values) == "resnet")
    tensors = {key: value.contiguous() for key, value in to_reference_keys(state, placements, all_copies=False).items()}
    metadata = {"format": "pt", METADATA: config.model_dump_json()}
    files = {PREPROCESSOR: json_text(write_processor(config, *pixel_statistics(config))), CONFIG: json_text(values)}
    write_files(folder, {WEIGHTS: lambda path: save_file(tensors, path, metadata=metadata), **files})


def read_config(described: Mapping[str, Any], processor_fields: Mapping[str, Any], path: Path) -> ModelConfig:
    """Translate a transformers config. Raises UserError, naming `path`, if this package has no equivalent."""
    model_type = described.get("model_type")
    if model_type != MODEL_TYPE:
        raise UserError(f"{path} is of model_type {model_type!r}; only {MODEL_TYPE!r} can be converted")
    values = {key: value for key, value in described.items() if value is not None}
    values.setdefault("d_model", values.get("hidden_size", 256))
    for name, default in (("attention_heads", 8), ("ffn_dim", 1024)):
        if values.get(f"encoder_{name}", default) != values.get(f"decoder_{name}", default):
            raise UserError(f"{path}: encoder_{name} and decoder_{name} must be equal")
    if values.get("two_stage"):
        values["num_queries"] = values.get("two_stage_num_proposals", 300)
    if values.get("activation_function") == "swish":
        values["activation_function"] = "silu"
    names, backbone = _class_names(described, path), _read_backbone(values, path)
    return ModelConfig.from_dict(
        {
            # Where a key is missing, transformers' default is ours: both are the paper's.
            **{field: values[key] for field, key in _FIELDS.items() if key in values},
            **backbone,
            **processor_fields,
            "class_names": names,
            "category_ids": tuple(range(len(names))),
            "num_classes": len(names),
            "backbone_weights": "none",
            "backbone_norm": "frozen",
            "frozen_stages": 2 if "resnet" in str(backbone["backbone"]) else 0,  # others may have none
        },
        str(path),
    )


def write_config(model: DeformableDETRNetwork) -> dict[str, Any]:
    """Return the transformers config of a model. Raises UserError if transformers lacks a part of it."""
    config = model.config
    check_supported(config, SUPPORTED, "transformers", "small-portable")
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


def _class_names(described: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """The names by label; missing ones get transformers' defaults."""
    id2label, count = described.get("id2label"), described.get("num_labels", 2)
    try:
        names = {int(label): name for label, name in id2label.items()} if id2label is not None else {}
        count = max(names) + 1 if id2label is not None else int(count)
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise UserError(f"{path}: id2label must map labels 0, 1, … to names, and num_labels be a number") from None
    if not 1 <= count <= _MAX_CLASSES or min(names, default=0) < 0:
        raise UserError(f"{path}: id2label or num_labels has labels outside of 0 to {_MAX_CLASSES - 1}")
    defaults = default_class_names(count)
    return tuple(str(names[i]) if names.get(i) is not None else default for i, default in enumerate(defaults))


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
        return _read_resnet(backbone or {}, values.get("num_feature_levels", 4), path)
    if backbone_type != "timm_backbone":
        raise UserError(f"{path}: backbone of type {backbone_type!r}; supported are 'timm_backbone' and 'resnet'")
    if backbone is None:
        return {"backbone": values.get("backbone") or "resnet50", "dilation": bool(values.get("dilation"))}
    stride = backbone.get("output_stride")
    if stride not in (None, 16, 32):
        raise UserError(f"{path}: the backbone's output_stride is {stride}; supported are 32, and 16 (dilation)")
    return {"backbone": backbone.get("backbone"), "dilation": stride == 16}


def _read_resnet(backbone: Mapping[str, Any], levels: Any, path: Path) -> dict[str, Any]:
    """Translate the config of transformers' own ResNet. Its defaults are those of `ResNetShape`."""
    values = {key: value for key, value in backbone.items() if value is not None}
    if values.get("downsample_in_first_stage"):
        raise UserError(f"{path}: a ResNet needs downsample_in_first_stage false")
    if values.get("hidden_act") == "swish":
        values["hidden_act"] = "silu"
    fields = {field: values[key] for field, key in _RESNET_FIELDS.items() if key in values}
    shape = ResNetShape.from_dict(fields, f"{path}: backbone_config")
    last = [f"stage{len(shape.depths)}"]
    stages = last if levels == 1 else ["stage2", "stage3", "stage4"][1 if levels == 2 else 0 :]
    if (features := values.get("out_features", last)) != stages:
        raise UserError(f"{path}: the backbone's out_features are {features}; supported are {stages}")
    return {"backbone": "resnet", "backbone_shape": shape}


def _write_backbone(model: DeformableDETRNetwork) -> dict[str, Any]:
    config, shape = model.config, model.config.backbone_shape
    features: Any = model.backbone.body.feature_info
    indices = list(features.out_indices)
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
        **{key: getattr(shape, field) for field, key in _RESNET_FIELDS.items()},
        "stage_names": stages,
        "out_indices": indices,
        "out_features": [stages[index] for index in indices],
    }


def _check_backbone(described: Mapping[str, Any], path: Path, network: Any) -> None:
    """Refuse a timm model with other maps than ours, or whose batch norms transformers replaces by different ones.

    Its own have eps 1e-5 and no activation. `network` is a `Backbone`, or a network that has one.
    """
    backbone = described.get("backbone_config") or {}
    if _backbone_type(described) != "timm_backbone":
        return
    body = getattr(network, "backbone", network).body
    indices = list(body.feature_info.out_indices)
    given = backbone.get("out_indices") or [-1]
    if backbone and [index % len(body.feature_info.info) for index in given] != indices:
        raise UserError(f"{path}: the backbone's out_indices are {given}; supported are {indices}")
    if backbone.get("freeze_batch_norm_2d"):
        return
    for module in body.modules():
        plain = isinstance(getattr(module, "act", None), torch.nn.Identity | None)
        if type(module).__name__.startswith("FrozenBatchNorm") and not (plain and module.eps == 1e-5):
            raise UserError(f"{path}: backbone {backbone.get('backbone')!r} needs freeze_batch_norm_2d: true")


def _untie(tensors: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Repeat the class head per layer: with refinement but one stage, transformers ties them and saves the first."""
    if not config.refine or config.two_stage:
        return tensors
    for part in ("weight", "bias"):
        first, *others = (f"class_embed.{layer}.{part}" for layer in range(config.decoder_layers))
        if first in tensors and not any(key in tensors for key in others):
            tensors |= dict.fromkeys(others, tensors[first])
    return tensors
