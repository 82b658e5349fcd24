"""State-dict keys of the official code and of transformers, and the conversion of tensors in both directions.

Transformers keys are those that its `save_pretrained` writes. The keys of its modules in memory and of its older
releases are read as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..config.schema import ModelConfig
from ..utils.errors import UserError

# Our key prefix → the prefix in the official code. The first match wins; "*" stands for a number.
OFFICIAL_KEYS = {
    "backbone.body.": "backbone.0.body.",
    "projections.levels.": "input_proj.",
    "position.rows": "backbone.1.row_embed.weight",
    "position.columns": "backbone.1.col_embed.weight",
    "level_embedding": "transformer.level_embed",
    "query_embedding.": "query_embed.",
    "reference_points.": "transformer.reference_points.",
    "proposals.memory_proj.": "transformer.enc_output.",
    "proposals.memory_norm.": "transformer.enc_output_norm.",
    "proposals.query_proj.": "transformer.pos_trans.",
    "proposals.query_norm.": "transformer.pos_trans_norm.",
    "encoder.layers.*.ffn.": "transformer.encoder.layers.*.",
    "encoder.layers.": "transformer.encoder.layers.",
    "decoder.layers.*.ffn.": "transformer.decoder.layers.*.",
    # The official decoder numbers its norms in the order of declaration, not of execution.
    "decoder.layers.*.norm1.": "transformer.decoder.layers.*.norm2.",
    "decoder.layers.*.norm2.": "transformer.decoder.layers.*.norm1.",
    "decoder.layers.": "transformer.decoder.layers.",
    "decoder.heads.classes.": "class_embed.",
    "decoder.heads.boxes.": "bbox_embed.",
}

TRANSFORMERS_KEYS = {
    "backbone.body.": "model.backbone.conv_encoder.model.",
    "projections.levels.": "model.input_proj.",
    "position.rows": "model.position_embedding.row_embeddings.weight",
    "position.columns": "model.position_embedding.column_embeddings.weight",
    "level_embedding": "model.level_embed",
    "query_embedding.": "model.query_position_embeddings.",
    "reference_points.": "model.reference_points.",
    "proposals.memory_proj.": "model.enc_output.",
    "proposals.memory_norm.": "model.enc_output_norm.",
    "proposals.query_proj.": "model.pos_trans.",
    "proposals.query_norm.": "model.pos_trans_norm.",
    "encoder.layers.*.ffn.linear*.": "model.encoder.layers.*.fc*.",
    "encoder.layers.*.norm1.": "model.encoder.layers.*.self_attn_layer_norm.",
    "encoder.layers.*.norm2.": "model.encoder.layers.*.final_layer_norm.",
    "encoder.layers.": "model.encoder.layers.",
    "decoder.layers.*.ffn.linear*.": "model.decoder.layers.*.fc*.",
    "decoder.layers.*.norm1.": "model.decoder.layers.*.self_attn_layer_norm.",
    "decoder.layers.*.norm2.": "model.decoder.layers.*.encoder_attn_layer_norm.",
    "decoder.layers.*.norm3.": "model.decoder.layers.*.final_layer_norm.",
    "decoder.layers.*.cross_attn.": "model.decoder.layers.*.encoder_attn.",
    "decoder.layers.": "model.decoder.layers.",
    "decoder.heads.classes.": "class_embed.",
    "decoder.heads.boxes.": "bbox_embed.",
}

# Inside the backbone of transformers' own ResNet, whose stages count from 0; other backbones keep timm's keys.
TRANSFORMERS_RESNET_KEYS = {
    "conv1.": "embedder.embedder.convolution.",
    "bn1.": "embedder.embedder.normalization.",
    "layer*.*.conv*.": "encoder.stages.*-1.layers.*.layer.*-1.convolution.",
    "layer*.*.bn*.": "encoder.stages.*-1.layers.*.layer.*-1.normalization.",
    "layer*.*.downsample.0.": "encoder.stages.*-1.layers.*.shortcut.convolution.",
    "layer*.*.downsample.1.": "encoder.stages.*-1.layers.*.shortcut.normalization.",
}

# Keys of transformers' modules in memory and of its older releases → those that it writes today.
_TRANSFORMERS_SYNONYMS = {
    r"^model\.backbone\.model\.": "model.backbone.conv_encoder.model.",
    r"^model\.backbone\.conv_encoder\.model\._backbone\.": "model.backbone.conv_encoder.model.",
    r"^model\.backbone\.position_embedding\.": "model.position_embedding.",
    r"\.mlp\.fc([12])\.": r".fc\1.",
    r"\.self_attn\.o_proj\.": ".self_attn.out_proj.",
}

# Batch-norm step counters, which no network here reads, and a profiler's leftovers in published files.
_IGNORED = re.compile(r"(^|\.)(num_batches_tracked|total_ops|total_params)$")


class KeyPlacement(NamedTuple):
    """Where one of our tensors is stored in another format.

    Attributes:
        parts: Keys of its equal parts along dimension 0; usually one.
        duplicates: Further keys of the same tensor.
    """

    parts: tuple[str, ...]
    duplicates: tuple[str, ...] = ()


Placements = dict[str, KeyPlacement]


def native_placements(names: Iterable[str], config: ModelConfig) -> Placements:
    """Place each tensor under its own key."""
    return {name: KeyPlacement((name,)) for name in names}


def official_placements(names: Iterable[str], config: ModelConfig) -> Placements:
    """Place our tensors in the official code's `model` dict. Raises UserError if it has no such module."""
    inside_decoder = {"bbox_embed.": config.refine, "class_embed.": config.two_stage}
    placements: Placements = {}
    for name in names:
        key = _translate(name, OFFICIAL_KEYS, "the official code")
        duplicates: tuple[str, ...] = ()
        for head, in_decoder in inside_decoder.items():
            if key.startswith(head):
                duplicates = _shared_layers(key, head, config)
                if in_decoder:
                    duplicates += tuple(f"transformer.decoder.{copy}" for copy in (key, *duplicates))
        placements[name] = KeyPlacement((key,), duplicates)
    return placements


def transformers_placements(names: Iterable[str], config: ModelConfig, own_resnet: bool = False) -> Placements:
    """Place our tensors in a transformers repository. Raises UserError if its model has no such module.

    Args:
        names: Our keys.
        config: The network.
        own_resnet: The backbone is transformers' own ResNet, not a timm model.
    """
    inside_decoder = {"bbox_embed.": config.refine, "class_embed.": config.two_stage}
    placements: Placements = {}
    for name in names:
        key = _translate(name, TRANSFORMERS_KEYS, "transformers")
        if own_resnet and name.startswith("backbone.body."):
            inside = _translate(name.removeprefix("backbone.body."), TRANSFORMERS_RESNET_KEYS, "transformers' ResNet")
            key = TRANSFORMERS_KEYS["backbone.body."] + inside
        parts, duplicates = (key,), ()
        if "self_attn.in_proj_" in key:
            parts = tuple(key.replace("in_proj_", f"{part}_proj.") for part in "qkv")
        for head, in_decoder in inside_decoder.items():
            if key.startswith(head):
                parts = (f"model.decoder.{key}",) if in_decoder else (key,)
                duplicates = (key,) if in_decoder else _shared_layers(key, head, config)
        placements[name] = KeyPlacement(parts, duplicates)
    return placements


def to_reference_keys(state: Mapping[str, Tensor], placements: Placements, duplicates: bool) -> dict[str, Tensor]:
    """Return our tensors under the other format's keys, with or without duplicates."""
    tensors: dict[str, Tensor] = {}
    for name, placement in placements.items():
        value = state[name]
        chunks = value.chunk(len(placement.parts)) if len(placement.parts) > 1 else [value]
        tensors |= {key: chunk.clone() for key, chunk in zip(placement.parts, chunks, strict=True)}
        tensors |= {key: value.clone() for key in (placement.duplicates if duplicates else ())}
    return tensors


def from_reference_keys(
    tensors: Mapping[str, Tensor], placements: Placements, expected: Mapping[str, Tensor], path: Path, config_name: str
) -> dict[str, Tensor]:
    """Return our tensors from the other format's.

    Args:
        tensors: The tensors as read.
        placements: Where ours are among them.
        expected: Our state dict, for shapes and kinds of numbers.
        path: File of the tensors, for errors.
        config_name: What describes the network, for errors.

    Raises:
        UserError: A tensor is missing, unknown, of another shape or kind, or differs from its duplicate.
    """
    # PyTorch has no arithmetic for 8-bit floats.
    tensors = {key: v.float() if v.is_floating_point() and v.itemsize < 4 else v for key, v in tensors.items()}
    state: dict[str, Tensor] = {}
    for name, (parts, duplicates) in placements.items():
        missing = [key for key in parts if key not in tensors]
        copies = [*([] if missing else [parts]), *((key,) for key in duplicates if key in tensors)]
        if not copies:
            if not _IGNORED.search(name):
                raise UserError(f"{path} lacks {missing[0]}, which {config_name} calls for")
            state[name] = torch.zeros_like(expected[name])
            continue
        values = [_join(tensors, keys, expected[name], path, config_name) for keys in copies]
        state[name] = values[0]
        for keys, value in zip(copies[1:], values[1:], strict=True):
            if not torch.equal(value, values[0]):
                raise UserError(f"{path}: {copies[0][0]} and {keys[0]} should be the same tensor, but differ")
    placed = {key for parts, duplicates in placements.values() for key in (*parts, *duplicates)}
    unknown = sorted(key for key in tensors.keys() - placed if not _IGNORED.search(key))
    if unknown:
        raise UserError(f"{path} has {len(unknown)} tensors that {config_name} does not call for: {unknown[0]}, …")
    return state


def modern_transformers_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a transformers repository's tensors to the keys that its `save_pretrained` writes today."""
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        for pattern, replacement in _TRANSFORMERS_SYNONYMS.items():
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def _join(
    tensors: Mapping[str, Tensor], keys: tuple[str, ...], expected: Tensor, path: Path, config_name: str
) -> Tensor:
    shape = expected.shape if len(keys) == 1 else (len(expected) // len(keys), *expected.shape[1:])
    for key in keys:
        value = tensors[key]
        if value.is_floating_point() != expected.is_floating_point():
            raise UserError(f"{path}: {key} has dtype {str(value.dtype).removeprefix('torch.')}")
        if value.shape != shape:
            raise UserError(f"{path}: {key} has shape {tuple(value.shape)}; {config_name} needs {tuple(shape)}")
    return tensors[keys[0]] if len(keys) == 1 else torch.cat([tensors[key] for key in keys])


def _translate(name: str, table: Mapping[str, str], target: str) -> str:
    for prefix, replacement in table.items():
        if match := re.match(re.escape(prefix).replace(r"\*", r"(\d+)"), name):
            for number in match.groups():
                before, _, after = replacement.partition("*")
                if after.startswith("-1"):
                    number, after = str(int(number) - 1), after.removeprefix("-1")
                replacement = before + number + after
            return replacement + name[match.end() :]
    raise UserError(f"{target} has no module for {name}, so this model cannot be converted")


def _shared_layers(key: str, head: str, config: ModelConfig) -> tuple[str, ...]:
    """The key for the decoder layers after the first, where all layers share our one head."""
    layers = range(1, 1 if config.refine else config.decoder_layers)
    return tuple(f"{head}{layer}{key.removeprefix(f'{head}0')}" for layer in layers)
