"""A transformers repository of Deformable DETR: config.json, weights and preprocessor_config.json, read and written.

The transformers library itself is not needed for either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.schema import ModelConfig, ResNetShape
from ..model.network import DeformableDETRNetwork, N
from ..utils.errors import UserError
from ..utils.files import json_text, read_json, write_files
from .files import read_repository
from .image_processor import PREPROCESSOR, processor_settings, read_processor, write_processor
from .key_mapping import Places, canonical, check_sizes, gather, spread, transformers_places

CONFIG = "config.json"
_MOST_CLASSES = 100_000
MODEL_TYPE = "deformable_detr"
# Our own config travels in the weights file's header: whoever writes the weights anew drops it, so it is never stale.
METADATA = "deformable-detr"
_OWN_FIELDS = ("backbone_norm", "frozen_stages", "category_ids", "look_forward_twice", "size_divisor")
_DEFAULTS: dict[str, Any] = {
    "d_model": 256, "encoder_attention_heads": 8, "decoder_attention_heads": 8, "encoder_layers": 6,
    "decoder_layers": 6, "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024, "encoder_n_points": 4,
    "decoder_n_points": 4, "num_feature_levels": 4, "num_queries": 300, "two_stage_num_proposals": 300,
    "with_box_refine": False, "two_stage": False, "position_embedding_type": "sine", "activation_function": "relu",
    "dropout": 0.1, "num_channels": 3, "dilation": False,
}  # fmt: skip
_RESNET_DEFAULTS: dict[str, Any] = {
    "num_channels": 3, "embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3],
    "layer_type": "bottleneck", "hidden_act": "relu", "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}  # fmt: skip
_TIMM_RESNETS: dict[tuple[str, tuple[int, ...]], str] = {  # (layer_type, depths) at the usual widths
    ("basic", (2, 2, 2, 2)): "resnet18", ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (2, 2, 2, 2)): "resnet26", ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101", ("bottleneck", (3, 8, 36, 3)): "resnet152",
}  # fmt: skip
_WIDTHS = {"basic": (64, 128, 256, 512), "bottleneck": (256, 512, 1024, 2048)}


def load(folder: Path, network_class: type[N] = DeformableDETRNetwork) -> tuple[ModelConfig, dict[str, Tensor], N]:
    """The config, our tensors and a model in their shape that does not hold them yet.

    Raises UserError for a repository of another architecture, of parts that have no equal here, or broken.
    """
    path = folder / CONFIG
    described = read_json(path)
    tensors, metadata, file = read_repository(folder)
    config = read_config(described, read_processor(folder), path)
    config = _with_own_fields(config, metadata.get(METADATA))
    check_sizes(config, tensors, path)
    model = network_class(config)
    _check_backbone(model, described, path)
    tensors = canonical(tensors)
    _untie(tensors, config)
    own = model.state_dict()
    state = gather(tensors, _places(own, config, _backbone_type(described) == "resnet"), own, str(file), CONFIG)
    state |= _counters(own, metadata.get(f"{METADATA}.counters"))
    return config, state, model


def save(model: DeformableDETRNetwork, folder: Path) -> None:
    """Writes the repository, its weights without the batch norms' counters, which go into the file's header.

    Raises UserError for a model with parts that transformers lacks, and where the folder cannot be written.
    """
    from safetensors.torch import save_file

    described, preprocessor = write_config(model), write_processor(model.config)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    places = _places(state, model.config, _backbone_type(described) == "resnet")
    counters = {name: int(value) for name, value in state.items() if name not in places and int(value)}
    metadata = {"format": "pt", METADATA: model.config.model_dump_json()}
    if counters:
        metadata[f"{METADATA}.counters"] = json.dumps(counters)
    tensors = {name: value.contiguous() for name, value in spread(state, places, copies=False).items()}
    write_files(
        folder,
        {
            "model.safetensors": lambda path: save_file(tensors, path, metadata=metadata),
            PREPROCESSOR: json_text(preprocessor),
            CONFIG: json_text(described),
        },
    )


def read_config(described: Mapping[str, Any], preprocessor: Mapping[str, Any], path: Path) -> ModelConfig:
    """Our config of a transformers config and image processor config."""
    kind = described.get("model_type")
    if kind != MODEL_TYPE:
        raise UserError(f"{path} describes a model of type {kind!r}; Deformable DETR is {MODEL_TYPE!r}")
    values = {**_DEFAULTS, **{key: value for key, value in described.items() if value is not None}}
    values["d_model"] = described.get("d_model") or described.get("hidden_size") or values["d_model"]
    for one, other in (
        ("encoder_attention_heads", "decoder_attention_heads"),
        ("encoder_ffn_dim", "decoder_ffn_dim"),
    ):
        if values[one] != values[other]:
            raise UserError(f"{path}: {one} {values[one]} and {other} {values[other]} must be the same here")
    if values["num_channels"] != 3:
        raise UserError(f"{path}: num_channels {values['num_channels']}; here images have 3")
    if not isinstance(values["d_model"], int) or values["d_model"] % 32:
        raise UserError(f"{path}: d_model {values['d_model']} is no multiple of 32")
    names = _class_names(described, path)
    return ModelConfig.from_dict(
        {
            **_read_backbone(values, path),
            **processor_settings(preprocessor, path.with_name(PREPROCESSOR)),
            "class_names": names,
            "category_ids": tuple(range(len(names))),
            "num_classes": len(names),
            "backbone_weights": "none",
            "backbone_norm": "frozen",
            "frozen_stages": 2,
            "num_feature_levels": values["num_feature_levels"],
            "hidden_dim": values["d_model"],
            "num_heads": values["encoder_attention_heads"],
            "encoder_layers": values["encoder_layers"],
            "decoder_layers": values["decoder_layers"],
            "encoder_points": values["encoder_n_points"],
            "decoder_points": values["decoder_n_points"],
            "ffn_dim": values["encoder_ffn_dim"],
            "dropout": values["dropout"],
            "activation": _activation(values["activation_function"]),
            "position_encoding": values["position_embedding_type"],
            "num_queries": values["two_stage_num_proposals"] if values["two_stage"] else values["num_queries"],
            "refine": values["with_box_refine"],
            "two_stage": values["two_stage"],
        },
        str(path),
    )


def write_config(model: DeformableDETRNetwork) -> dict[str, Any]:
    """The transformers config of a model. Raises UserError for what transformers has no setting for."""
    config = model.config
    check_parts(config)
    names = config.class_names or tuple(f"LABEL_{label}" for label in range(config.num_classes))
    return {
        "architectures": ["DeformableDetrForObjectDetection"],
        "model_type": MODEL_TYPE,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "backbone_config": _write_backbone(model),
        "dilation": config.dilation,
        "num_channels": 3,
        "num_feature_levels": config.num_feature_levels,
        "d_model": config.hidden_dim,
        "encoder_attention_heads": config.num_heads,
        "decoder_attention_heads": config.num_heads,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_ffn_dim": config.ffn_dim,
        "decoder_ffn_dim": config.ffn_dim,
        "encoder_n_points": config.encoder_points,
        "decoder_n_points": config.decoder_points,
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
        "activation_dropout": config.dropout,
        "activation_function": config.activation,
        "position_embedding_type": config.position_encoding,
        "num_queries": config.num_queries,
        "two_stage": config.two_stage,
        "two_stage_num_proposals": config.num_queries,
        "with_box_refine": config.refine,
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in reversed(list(enumerate(names)))},
    }


def check_parts(config: ModelConfig) -> None:
    """Raises UserError for a network with parts that transformers lacks, which names them all."""
    plain = {"pre_norm": False, "class_aware_proposals": False, "query_init": "box", "iterative_query_pos": False}
    lacking = [
        f"{field}: {getattr(config, field)}" for field, value in plain.items() if getattr(config, field) != value
    ]
    if lacking:
        raise UserError(
            f"transformers has no model with {', '.join(lacking)}, so this one cannot be converted to it; "
            "--preset small-portable, two-stage and the paper's others can (train --weights takes over what fits)"
        )
    if config.hidden_dim % 32:
        raise UserError(f"transformers needs a hidden_dim that 32 divides; this model's is {config.hidden_dim}")


def _class_names(described: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    names = described.get("id2label")
    if names is None:
        count = described.get("num_labels", 2)
        if not isinstance(count, int) or not 1 <= count <= _MOST_CLASSES:
            raise UserError(f"{path}: num_labels {count!r:.40} is no number of classes")
        return tuple(f"LABEL_{label}" for label in range(count))
    if not isinstance(names, dict) or not names:
        raise UserError(f"{path}: id2label must map labels to names")
    by_label: dict[int, str] = {}
    for label, name in names.items():
        if not label.isdecimal() or len(label) > 9 or int(label) >= _MOST_CLASSES:
            raise UserError(f"{path}: id2label has {label[:40]!r}, which is no label; labels are 0, 1, …")
        if not isinstance(name, str | int | float | None):
            raise UserError(f"{path}: id2label gives label {label} no name but {str(name)[:40]}")
        by_label[int(label)] = f"LABEL_{label}" if name is None else str(name)
    return tuple(by_label.get(label, f"LABEL_{label}") for label in range(max(by_label) + 1))


def _activation(name: Any) -> Any:
    return "silu" if name == "swish" else name


def _backbone_type(described: Mapping[str, Any]) -> str:
    backbone = described.get("backbone_config")
    if isinstance(backbone, dict):
        return str(backbone.get("model_type", "timm_backbone" if "backbone" in backbone else "resnet"))
    return "timm_backbone" if described.get("use_timm_backbone", True) is not False else "resnet"


def _read_backbone(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    kind, backbone = _backbone_type(values), values.get("backbone_config")
    if backbone is not None and not isinstance(backbone, dict):
        raise UserError(f"{path}: backbone_config is no JSON object")
    if kind == "timm_backbone":
        if backbone is None:
            return {"backbone": values.get("backbone") or "resnet50", "dilation": bool(values["dilation"])}
        stride = backbone.get("output_stride")
        if stride not in (None, 16, 32):
            raise UserError(f"{path}: output_stride {stride} of the backbone; here it is 32, or 16 with dilation")
        return {"backbone": backbone.get("backbone"), "dilation": stride == 16}
    if kind != "resnet":
        raise UserError(f"{path}: a backbone of type {kind!r}; known are 'timm_backbone' and 'resnet'")
    if backbone is None and values.get("backbone"):
        raise UserError(f"{path}: backbone {values['backbone']!r} without its backbone_config")
    shape = {**_RESNET_DEFAULTS, **{key: value for key, value in (backbone or {}).items() if value is not None}}
    if shape["num_channels"] != 3 or shape["downsample_in_first_stage"]:
        raise UserError(f"{path}: a ResNet with num_channels 3 and without downsample_in_first_stage is known here")
    known = ResNetShape.from_dict(
        {
            "block": shape["layer_type"],
            "depths": shape["depths"],
            "widths": shape["hidden_sizes"],
            "stem": shape["embedding_size"],
            "activation": _activation(shape["hidden_act"]),
            "stride_first": shape["downsample_in_bottleneck"] and shape["layer_type"] == "bottleneck",
        },
        f"{path}: backbone_config",
    )
    name = _TIMM_RESNETS.get((known.block, known.depths))
    if name and known == ResNetShape(block=known.block, depths=known.depths, widths=_WIDTHS[known.block]):
        return {"backbone": name}
    return {"backbone": "resnet", "backbone_shape": known.model_dump()}


def _write_backbone(model: DeformableDETRNetwork) -> dict[str, Any]:
    config, shape = model.config, model.config.backbone_shape
    if shape is not None:
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
            "out_indices": list(_maps(model).out_indices),
            "out_features": [stages[index] for index in _maps(model).out_indices],
        }
    return {
        "model_type": "timm_backbone",
        "backbone": config.backbone,
        "num_channels": 3,
        "features_only": True,
        "use_pretrained_backbone": False,
        "out_indices": list(_maps(model).out_indices),
        "output_stride": 16 if config.dilation else None,
        # Without this transformers swaps batch norms for its own and thereby loses the activations that some carry.
        "freeze_batch_norm_2d": True,
    }


def _maps(model: DeformableDETRNetwork) -> Any:
    """timm's description of the feature maps that the backbone gives."""
    return model.backbone.body.feature_info


def _check_backbone(model: DeformableDETRNetwork, described: Mapping[str, Any], path: Path) -> None:
    """That transformers would take the same maps of the same network as we do."""
    body, backbone, kind = model.backbone.body, described.get("backbone_config"), _backbone_type(described)
    backbone = backbone if isinstance(backbone, dict) else {}
    count = len(_maps(model).info)
    ours = list(_maps(model).out_indices)
    theirs, features, stages = (backbone.get(key) for key in ("out_indices", "out_features", "stage_names"))
    if theirs is None and isinstance(features, list) and isinstance(stages, list):
        theirs = [stages.index(name) if name in stages else name for name in features]
    if theirs is None and (backbone or kind == "resnet"):
        theirs = [-1]  # transformers' default for a backbone of its own config
    if theirs is not None and (
        not isinstance(theirs, list | tuple)
        or [index % count if isinstance(index, int) else index for index in theirs] != ours
    ):
        raise UserError(f"{path}: feature maps {theirs} of the backbone; with these levels they are {ours} here")
    if kind != "timm_backbone" or backbone.get("freeze_batch_norm_2d"):
        return
    for module in body.modules():
        carried = getattr(module, "act", None)
        if type(module).__name__.startswith("FrozenBatchNorm") and (
            module.eps != 1e-5 or not isinstance(carried, torch.nn.Identity | None)
        ):
            raise UserError(
                f"{path}: transformers replaces the batch norms of backbone '{model.config.backbone}' by others that "
                "compute something else unless freeze_batch_norm_2d is true; such a network is not known here"
            )


def _with_own_fields(config: ModelConfig, described: str | None) -> ModelConfig:
    """The config with what transformers has no setting for, where the weights file carries it."""
    if described is None:
        return config
    try:
        own = ModelConfig.from_dict(json.loads(described)).without_pretrained_backbone()
        changes = {field: getattr(own, field) for field in _OWN_FIELDS}
        default = tuple(f"LABEL_{label}" for label in range(config.num_classes))
        if not own.class_names and config.class_names == default:
            changes["class_names"] = ()
        elif own.class_names != config.class_names:
            del changes["category_ids"]
        return config.replace(**changes)
    except (ValueError, RecursionError, UserError):
        return config  # written by another release; all that it adds is convenience


def _places(state: Mapping[str, Tensor], config: ModelConfig, own_resnet: bool) -> Places:
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    return transformers_places(names, config, own_resnet)


def _counters(own: Mapping[str, Tensor], described: str | None) -> dict[str, Tensor]:
    """The batch norms' counters that training norms have: zero where the file's header does not tell them."""
    try:
        known = json.loads(described or "{}")
        return {name: torch.tensor(int(known.get(name, 0))) for name in own if name.endswith("num_batches_tracked")}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, RuntimeError):
        raise UserError("the header of the weights file holds counters that are no numbers") from None


def _untie(tensors: dict[str, Tensor], config: ModelConfig) -> None:
    """Class heads that transformers ties although each layer has its own are saved once only: one for each layer."""
    if not config.refine or config.two_stage:
        return
    for part in ("weight", "bias"):
        names = [f"class_embed.{layer}.{part}" for layer in range(config.decoder_layers)]
        if names[0] in tensors and not any(name in tensors for name in names[1:]):
            tensors.update(dict.fromkeys(names[1:], tensors[names[0]]))
