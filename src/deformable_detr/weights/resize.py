"""Adapt weights to another number of queries or feature levels."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..config.schema import ModelConfig
from ..model.backbone import backbone_strides
from ..model.network import DeformableDETRNetwork

_ATTENTION = re.compile(r"(encoder|decoder)\.layers\.\d+\.\w+_attn\.(sampling_offsets|attention_weights)\.")
_PROJECTION = re.compile(r"projections\.levels\.(\d+)\.(.+)")
_QUERIES = ("query_embedding.weight", "query_boxes.weight", "proposals.query_embedding.weight")


def level_strides(config: ModelConfig) -> list[int]:
    """Return the stride of each feature level. What a level learned belongs to its stride, not to its index."""
    finest = 16 if config.dilation else backbone_strides(config)[0]
    return [finest << level for level in range(config.num_feature_levels)]


def resize_state(
    state: Mapping[str, Tensor], config: ModelConfig, model: DeformableDETRNetwork
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors of a network with `config`, cut or extended to the queries and feature levels of `model`.

    Extensions are the model's own initial values; they are described by tensor name in the second dict. Tensors that
    depend on neither are returned unchanged, even if they do not fit the model.
    """
    strides, new_strides = level_strides(config), level_strides(model.config)
    shared = [(new, strides.index(stride)) for new, stride in enumerate(new_strides) if stride in strides]
    added = ", ".join(f"stride {stride}" for stride in new_strides if stride not in strides)
    initial = model.state_dict()
    resized: dict[str, Tensor] = {}
    extensions: dict[str, str] = {}
    for name, value in state.items():
        own = initial[name].to(value.dtype) if name in initial else None
        if match := _PROJECTION.match(name):
            resized |= {f"projections.levels.{new}.{match[2]}": value for new, old in shared if old == int(match[1])}
        elif own is None or own.shape[1:] != value.shape[1:]:
            resized[name] = value
        elif name in _QUERIES:
            kept = min(len(value), len(own))
            resized[name] = torch.cat((value[:kept], own[kept:]))
            if kept < len(own):
                extensions[name] = f"queries from {kept + 1} on"
        elif strides != new_strides and (groups := _groups_per_level(name, config, model.config)):
            # (groups · L · …, …) → (groups, L, …), to copy level by level.
            levels = own.reshape(groups, len(new_strides), -1, *own.shape[1:]).clone()
            old_levels = value.reshape(groups, len(strides), -1, *own.shape[1:])
            for new, old in shared:
                levels[:, new] = old_levels[:, old]
            resized[name] = levels.reshape(own.shape)
            if added:
                extensions[name] = added
        else:
            resized[name] = value
    return resized, extensions


def _groups_per_level(name: str, config: ModelConfig, target: ModelConfig) -> int:
    """Number of groups of rows that each have a part per level; 0 if there are none, or they differ in the target."""
    if name == "level_embedding":
        return 1
    match = _ATTENTION.match(name)
    if match is None or config.num_heads != target.num_heads:
        return 0
    points = f"{match[1]}_points"
    return config.num_heads if getattr(config, points) == getattr(target, points) else 0
