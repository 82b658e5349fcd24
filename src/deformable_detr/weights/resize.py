"""The same weights for another number of queries or of feature levels."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..config.schema import ModelConfig
from ..model.backbone import STRIDES
from ..model.network import DeformableDETRNetwork

_ATTENTION = re.compile(r"(encoder|decoder)\.layers\.\d+\.\w+_attn\.(sampling_offsets|attention_weights)\.")
_QUERIES = ("query_embedding.weight", "proposals.query_embedding.weight")


def level_strides(config: ModelConfig) -> list[int]:
    """The stride of each feature level; what a level has learned belongs to its stride, not to its number."""
    if config.num_feature_levels == 1:
        return [STRIDES[-2] if config.dilation else STRIDES[-1]]
    if config.num_feature_levels <= len(STRIDES):
        return list(STRIDES[-config.num_feature_levels :])
    return [STRIDES[0] << level for level in range(config.num_feature_levels)]


def resized(
    state: Mapping[str, Tensor], config: ModelConfig, model: DeformableDETRNetwork
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a model with `config` in the shapes of `model`, whose own values fill what the source does not have.

    Returns them and, by name, what of each is new. Tensors that neither queries nor levels are concerned with stay as
    they are, whether they fit or not.
    """
    target = model.config
    before, after = level_strides(config), level_strides(target)
    pairs = [(i, before.index(stride)) for i, stride in enumerate(after) if stride in before]
    own = {name: value.to(_like(name, value, state)) for name, value in model.state_dict().items()}
    out: dict[str, Tensor] = {}
    new: dict[str, str] = {}
    levels = [f"stride {stride}" for stride in after if stride not in before]
    for name, value in state.items():
        if name.startswith("projections.levels."):
            continue
        if name in _QUERIES and name in own and value.shape[1:] == own[name].shape[1:]:
            kept = min(len(value), len(own[name]))
            out[name] = torch.cat((value[:kept], own[name][kept:]))
            if kept < len(own[name]):
                new[name] = f"queries from {kept + 1} on"
        elif before != after and _per_level(name, value, own.get(name), config, target):
            heads, rest = 1 if name == "level_embedding" else config.num_heads, value.shape[1:]
            source = value.reshape(heads, len(before), -1, *rest)
            made = own[name].reshape(heads, len(after), -1, *rest).clone()
            for here, there in pairs:
                made[:, here] = source[:, there]
            out[name] = made.reshape(own[name].shape)
            if levels:
                new[name] = ", ".join(levels)
        else:
            out[name] = value
    for here, there in pairs:
        for part in ("0.weight", "0.bias", "1.weight", "1.bias"):
            value = state.get(f"projections.levels.{there}.{part}")
            if value is not None:
                out[f"projections.levels.{here}.{part}"] = value
    return out, new


def _per_level(name: str, value: Tensor, own: Tensor | None, config: ModelConfig, target: ModelConfig) -> bool:
    """Whether a tensor has a part a level, and these parts are alike in both models."""
    if own is None or value.shape[1:] != own.shape[1:]:
        return False
    if name == "level_embedding":
        return True
    match = _ATTENTION.match(name)
    if match is None or config.num_heads != target.num_heads:
        return False
    field = f"{match[1]}_points"
    return getattr(config, field) == getattr(target, field)


def _like(name: str, value: Tensor, state: Mapping[str, Tensor]) -> torch.dtype:
    """The precision of the source's tensors, so that filling them up loses none."""
    source = state.get(name)
    return source.dtype if source is not None else value.dtype
