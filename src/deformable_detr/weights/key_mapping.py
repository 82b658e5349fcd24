"""State-dict keys of the official code and of transformers, and the conversion of tensors in both directions.

Transformers keys are those that its `save_pretrained` writes. The keys of its modules in memory and of its older
releases are read as well.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..config.schema import ModelConfig
from ..utils.errors import UserError

# Our key prefix → the prefix in both other formats, inside "transformer." or "model.".
_COMMON_KEYS = {
    "level_embedding": "level_embed",
    "reference_points.": "reference_points.",
    "proposals.memory_proj.": "enc_output.",
    "proposals.memory_norm.": "enc_output_norm.",
    "proposals.query_proj.": "pos_trans.",
    "proposals.query_norm.": "pos_trans_norm.",
    "encoder.layers.": "encoder.layers.",
    "decoder.layers.": "decoder.layers.",
}

# Our key prefix → the prefix in the official code. The first match wins; "*" stands for a number.
OFFICIAL_KEYS = {
    "backbone.body.": "backbone.0.body.",
    "projections.levels.": "input_proj.",
    "position.rows": "backbone.1.row_embed.weight",
    "position.columns": "backbone.1.col_embed.weight",
    "query_embedding.": "query_embed.",
    "encoder.layers.*.ffn.": "transformer.encoder.layers.*.",
    "decoder.layers.*.ffn.": "transformer.decoder.layers.*.",
    # The official decoder numbers its norms in the order of declaration, not of execution.
    "decoder.layers.*.norm1.": "transformer.decoder.layers.*.norm2.",
    "decoder.layers.*.norm2.": "transformer.decoder.layers.*.norm1.",
    "decoder.heads.classes.": "class_embed.",
    "decoder.heads.boxes.": "bbox_embed.",
} | {ours: f"transformer.{key}" for ours, key in _COMMON_KEYS.items()}

TRANSFORMERS_KEYS = {
    "backbone.body.": "model.backbone.conv_encoder.model.",
    "projections.levels.": "model.input_proj.",
    "position.rows": "model.position_embedding.row_embeddings.weight",
    "position.columns": "model.position_embedding.column_embeddings.weight",
    "query_embedding.": "model.query_position_embeddings.",
    "encoder.layers.*.ffn.linear*.": "model.encoder.layers.*.fc*.",
    "encoder.layers.*.norm1.": "model.encoder.layers.*.self_attn_layer_norm.",
    "encoder.layers.*.norm2.": "model.encoder.layers.*.final_layer_norm.",
    "decoder.layers.*.ffn.linear*.": "model.decoder.layers.*.fc*.",
    "decoder.layers.*.norm1.": "model.decoder.layers.*.self_attn_layer_norm.",
    "decoder.layers.*.norm2.": "model.decoder.layers.*.encoder_attn_layer_norm.",
    "decoder.layers.*.norm3.": "model.decoder.layers.*.final_layer_norm.",
    "decoder.layers.*.cross_attn.": "model.decoder.layers.*.encoder_attn.",
    "decoder.heads.classes.": "class_embed.",
    "decoder.heads.boxes.": "bbox_embed.",
} | {ours: f"model.{key}" for ours, key in _COMMON_KEYS.items()}

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

Placements = dict[str, list[tuple[str, ...]]]
"""Our key → equal copies of the tensor in another format; each copy is split along dimension 0 over its keys."""


def official_placements(names: Iterable[str], config: ModelConfig) -> Placements:
    """Place our tensors in the official code's `model` dict. Raises UserError if it has no such module."""
    keys = {name: translate(name, OFFICIAL_KEYS, "the official code") for name in names}
    return {name: [(copy,) for copy in head_copies(key, "transformer", config)] for name, key in keys.items()}


def transformers_placements(names: Iterable[str], config: ModelConfig, own_resnet: bool = False) -> Placements:
    """Place our tensors in a transformers repository, perhaps one whose backbone is transformers' own ResNet.

    Raises UserError if its model has no such module.
    """
    placements: Placements = {}
    for name in names:
        key = translate(name, TRANSFORMERS_KEYS, "transformers")
        if own_resnet and name.startswith("backbone.body."):
            inside = translate(name.removeprefix("backbone.body."), TRANSFORMERS_RESNET_KEYS, "transformers' ResNet")
            key = TRANSFORMERS_KEYS["backbone.body."] + inside
        if "self_attn.in_proj_" in key:
            placements[name] = [tuple(key.replace("in_proj_", f"{part}_proj.") for part in "qkv")]
        else:
            placements[name] = [(copy,) for copy in head_copies(key, "model", config)]
    return placements


def to_reference_keys(state: Mapping[str, Tensor], placements: Placements, all_copies: bool) -> dict[str, Tensor]:
    """Return our tensors under the other format's keys: all copies of each, or only the first."""
    tensors: dict[str, Tensor] = {}
    for name, copies in placements.items():
        for keys in copies if all_copies else copies[:1]:
            parts = state[name].chunk(len(keys)) if len(keys) > 1 else [state[name]]
            tensors |= {key: part.clone() for key, part in zip(keys, parts, strict=True)}
    return tensors


def from_reference_keys(
    tensors: Mapping[str, Tensor], placements: Placements, expected: Mapping[str, Tensor], path: Path, config_name: str
) -> dict[str, Tensor]:
    """Return our tensors, with the shapes and kinds of numbers of our state dict `expected`, from the other format's.

    Raises UserError, naming `path` and `config_name`, if a tensor is missing, unknown or of another shape or kind, or
    differs from its copy.
    """
    # PyTorch has no arithmetic for 8-bit floats.
    tensors = {key: v.float() if v.is_floating_point() and v.itemsize < 4 else v for key, v in tensors.items()}
    state: dict[str, Tensor] = {}
    for name, copies in placements.items():
        present = [keys for keys in copies if tensors.keys() >= set(keys)]
        if present:
            state[name], *others = [_join(tensors, keys, expected[name], path, config_name) for keys in present]
            if not all(torch.equal(state[name], other) for other in others):
                raise UserError(f"{path}: {present[0][0]} and {present[1][0]} should be the same tensor, but differ")
        elif _IGNORED.search(name):
            state[name] = torch.zeros_like(expected[name])
        else:
            missing = next(key for key in copies[0] if key not in tensors)
            raise UserError(f"{path} lacks {missing}, which {config_name} calls for")
    placed = {key for copies in placements.values() for keys in copies for key in keys}
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


def translate(name: str, table: Mapping[str, str], target: str) -> str:
    """Return the key of our tensor in another format. Raises UserError, naming `target`, if the table has none."""
    for prefix, replacement in table.items():
        if match := re.match(re.escape(prefix).replace(r"\*", r"(\d+)"), name):
            for number in match.groups():
                before, _, after = replacement.partition("*")
                if after.startswith(("-1", "+1")):
                    number, after = str(int(number) + int(after[:2])), after[2:]
                replacement = before + number + after
            return replacement + name[match.end() :]
    raise UserError(f"{target} has no module for {name}, so this model cannot be converted")


def head_copies(key: str, root: str | None, config: ModelConfig) -> list[str]:
    """Return the key and, of a head, those of the layers that share it and of the decoder's references to it.

    The decoder's are the first; `root` is its prefix, None if it refers to none.
    """
    match = re.match(r"(class_embed|bbox_embed|bbox_head\.\w+)\.\d+\.", key)
    if match is None:
        return [key]
    head = match[1]
    layers = range(1, 1 if config.refine else config.decoder_layers)
    copies = [key, *(key.replace(f"{head}.0.", f"{head}.{layer}.") for layer in layers)]
    in_decoder = root is not None and (config.refine if head == "bbox_embed" else config.two_stage)
    return [f"{root}.decoder.{copy}" for copy in copies if in_decoder] + copies
