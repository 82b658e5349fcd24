"""What our tensors are called in the other two formats, and how sets of tensors go there and back.

Official: the repository of the paper's authors. Transformers: the names that its `save_pretrained` writes; the newer
ones of its modules in memory, and those of older releases, are read as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..config.schema import ModelConfig
from ..utils.errors import UserError


class KeyPlacement(NamedTuple):
    """Where one of our tensors lies in another format.

    parts: names of its equal parts along dimension 0, usually one.
    copies: further names of the very same tensor.
    """

    parts: tuple[str, ...]
    copies: tuple[str, ...] = ()


Places = dict[str, KeyPlacement]
_Rules = tuple[tuple[str, str], ...]

# First match at the start of our name wins.
_OFFICIAL: _Rules = (
    (r"backbone\.body\.", "backbone.0.body."),
    (r"projections\.levels\.", "input_proj."),
    (r"position\.rows$", "backbone.1.row_embed.weight"),
    (r"position\.columns$", "backbone.1.col_embed.weight"),
    (r"level_embedding$", "transformer.level_embed"),
    (r"query_embedding\.", "query_embed."),
    (r"reference_points\.", "transformer.reference_points."),
    (r"proposals\.memory_proj\.", "transformer.enc_output."),
    (r"proposals\.memory_norm\.", "transformer.enc_output_norm."),
    (r"proposals\.query_proj\.", "transformer.pos_trans."),
    (r"proposals\.query_norm\.", "transformer.pos_trans_norm."),
    (r"(encoder|decoder)\.layers\.(\d+)\.ffn\.", r"transformer.\1.layers.\2."),
    # There the norms are numbered as the modules are declared, not as they are run.
    (r"decoder\.layers\.(\d+)\.norm1\.", r"transformer.decoder.layers.\1.norm2."),
    (r"decoder\.layers\.(\d+)\.norm2\.", r"transformer.decoder.layers.\1.norm1."),
    (r"(encoder|decoder)\.layers\.", r"transformer.\1.layers."),
    (r"decoder\.heads\.classes\.", "class_embed."),
    (r"decoder\.heads\.boxes\.", "bbox_embed."),
)

_TRANSFORMERS: _Rules = (
    (r"backbone\.body\.", "model.backbone.conv_encoder.model."),
    (r"projections\.levels\.", "model.input_proj."),
    (r"position\.rows$", "model.position_embedding.row_embeddings.weight"),
    (r"position\.columns$", "model.position_embedding.column_embeddings.weight"),
    (r"level_embedding$", "model.level_embed"),
    (r"query_embedding\.", "model.query_position_embeddings."),
    (r"reference_points\.", "model.reference_points."),
    (r"proposals\.memory_proj\.", "model.enc_output."),
    (r"proposals\.memory_norm\.", "model.enc_output_norm."),
    (r"proposals\.query_proj\.", "model.pos_trans."),
    (r"proposals\.query_norm\.", "model.pos_trans_norm."),
    (r"(encoder|decoder)\.layers\.(\d+)\.ffn\.linear([12])\.", r"model.\1.layers.\2.fc\3."),
    (r"(encoder|decoder)\.layers\.(\d+)\.norm1\.", r"model.\1.layers.\2.self_attn_layer_norm."),
    (r"encoder\.layers\.(\d+)\.norm2\.", r"model.encoder.layers.\1.final_layer_norm."),
    (r"decoder\.layers\.(\d+)\.norm2\.", r"model.decoder.layers.\1.encoder_attn_layer_norm."),
    (r"decoder\.layers\.(\d+)\.norm3\.", r"model.decoder.layers.\1.final_layer_norm."),
    (r"decoder\.layers\.(\d+)\.cross_attn\.", r"model.decoder.layers.\1.encoder_attn."),
    (r"(encoder|decoder)\.layers\.", r"model.\1.layers."),
    (r"decoder\.heads\.classes\.", "class_embed."),
    (r"decoder\.heads\.boxes\.", "bbox_embed."),
)

# Names that mean what another one means: those of transformers' modules in memory and of its older releases.
_SYNONYMS: _Rules = (
    (r"^model\.backbone\.model\.", "model.backbone.conv_encoder.model."),
    (r"^model\.backbone\.conv_encoder\.model\._backbone\.", "model.backbone.conv_encoder.model."),
    (r"^model\.backbone\.position_embedding\.", "model.position_embedding."),
    (r"\.mlp\.fc([12])\.", r".fc\1."),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
)

# transformers' own ResNet, against torchvision's names that all others have.
_RESNET: _Rules = (
    (r"conv1\.", "embedder.embedder.convolution."),
    (r"bn1\.", "embedder.embedder.normalization."),
    (r"layer(\d)\.(\d+)\.conv(\d)\.", r"encoder.stages.<\1>.layers.\2.layer.<\3>.convolution."),
    (r"layer(\d)\.(\d+)\.bn(\d)\.", r"encoder.stages.<\1>.layers.\2.layer.<\3>.normalization."),
    (r"layer(\d)\.(\d+)\.downsample\.0\.", r"encoder.stages.<\1>.layers.\2.shortcut.convolution."),
    (r"layer(\d)\.(\d+)\.downsample\.1\.", r"encoder.stages.<\1>.layers.\2.shortcut.normalization."),
)

# Counters that mean nothing to a network that is run, and leftovers of a profiler in published files.
_IGNORED = re.compile(r"(^|\.)(num_batches_tracked|total_ops|total_params)$")


def official_places(names: Iterable[str], config: ModelConfig) -> Places:
    """Places of our tensors in the official code's `model` dict."""
    copies = {"bbox_embed.": config.refine, "class_embed.": config.two_stage}
    places: Places = {}
    for name in names:
        theirs = _renamed(name, _OFFICIAL, "the official code")
        others: tuple[str, ...] = ()
        for head, twice in copies.items():
            if theirs.startswith(head):
                same = [theirs] if config.refine else [f"{head}{i}{theirs[len(head) + 1 :]}" for i in _layers(config)]
                others = tuple(same[1:]) + (tuple(f"transformer.decoder.{n}" for n in same) if twice else ())
        places[name] = KeyPlacement((theirs,), others)
    return places


def transformers_places(names: Iterable[str], config: ModelConfig, own_resnet: bool = False) -> Places:
    """Places of our tensors in a transformers repository. own_resnet: its backbone is transformers' own ResNet."""
    homes = {"bbox_embed.": config.refine, "class_embed.": config.two_stage}  # where it keeps the heads' only copy
    places: Places = {}
    for name in names:
        theirs = _renamed(name, _TRANSFORMERS, "transformers")
        if own_resnet and name.startswith("backbone.body."):
            inside = _renamed(name.removeprefix("backbone.body."), _RESNET, "transformers' ResNet")
            inside = re.sub(r"<(\d)>", lambda digit: str(int(digit[1]) - 1), inside)
            theirs = f"model.backbone.conv_encoder.model.{inside}"
        parts, others = (theirs,), ()
        if "self_attn.in_proj_" in theirs:
            parts = tuple(theirs.replace("in_proj_", f"{part}_proj.") for part in "qkv")
        for head, inner in homes.items():
            if theirs.startswith(head) and inner:
                parts, others = (f"model.decoder.{theirs}",), (theirs,)
            elif theirs.startswith(head) and not config.refine:
                others = tuple(f"{head}{i}{theirs[len(head) + 1 :]}" for i in _layers(config)[1:])
        places[name] = KeyPlacement(parts, others)
    return places


def spread(state: Mapping[str, Tensor], places: Places, copies: bool) -> dict[str, Tensor]:
    """Our tensors under the other format's names, with every copy or without."""
    out: dict[str, Tensor] = {}
    for name, place in places.items():
        value = state[name]
        for part, piece in zip(place.parts, value.chunk(len(place.parts)) if value.dim() else [value], strict=True):
            out[part] = piece.clone()
        for copy in place.copies if copies else ():
            out[copy] = value.clone()
    return out


def gather(
    found: Mapping[str, Tensor], places: Places, own: Mapping[str, Tensor], where: str, fits: str
) -> dict[str, Tensor]:
    """Our tensors out of the other format's.

    own: our tensors as they are to be, for their shapes. where, fits: the file, and the config it should fit, for
    messages. Raises UserError where a tensor is missing, unknown, of another shape, or has copies that differ.
    """
    # Not all arithmetic is there for numbers of one byte.
    found = {
        name: value.float() if value.is_floating_point() and value.itemsize < 4 else value
        for name, value in found.items()
    }
    state: dict[str, Tensor] = {}
    for name, place in places.items():
        wanted = own[name].shape
        present = [n for n in (place.parts[0], *place.copies) if n in found]
        lacking = [part for part in place.parts if part not in found]
        if len(place.parts) > 1:
            wanted = torch.Size((wanted[0] // len(place.parts), *wanted[1:]))
            present = [part for part in place.parts if part in found]
        if lacking and (len(place.parts) > 1 or not present):
            if not _IGNORED.search(name):
                raise UserError(f"{where} lacks {lacking[0]}: it does not fit {fits}")
            state[name] = torch.zeros_like(own[name])
            continue
        for n in present:
            if found[n].is_floating_point() != own[name].is_floating_point():
                raise UserError(f"{where}: {n} holds {str(found[n].dtype).removeprefix('torch.')} numbers")
            if found[n].shape != wanted:
                shapes = f"{tuple(found[n].shape)}, not {tuple(wanted)}"
                raise UserError(f"{where}: {n} has shape {shapes}: it does not fit {fits}")
        if len(place.parts) > 1:
            state[name] = torch.cat([found[part] for part in place.parts])
            continue
        state[name] = found[present[0]]
        for other in present[1:]:
            if not torch.equal(found[other], state[name]):
                raise UserError(f"{where}: {present[0]} and {other} should be the same tensor and differ")
    known = {n for place in places.values() for n in (*place.parts, *place.copies)}
    unknown = sorted(n for n in found if n not in known and not _IGNORED.search(n))
    if unknown:
        raise UserError(f"{where} has the unknown tensor {unknown[0]} (in all {len(unknown)}): it does not fit {fits}")
    return state


def check_sizes(config: ModelConfig, tensors: Mapping[str, Tensor], path: object) -> None:
    """That no size in a config is beyond all sizes in the weights it is of, before memory is taken for it.

    path: the config's file. Raises UserError.
    """
    largest = max([len(tensors), *(size for value in tensors.values() for size in value.shape)], default=0)
    shape = config.backbone_shape
    sizes = {
        "hidden_dim": config.hidden_dim,
        "ffn_dim": config.ffn_dim,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "num_classes": config.num_classes,
        "num_queries": 0 if config.two_stage and config.query_init != "learned" else config.num_queries,
        "heads × levels × points": config.num_heads
        * config.num_feature_levels
        * max(config.decoder_points, config.encoder_points if config.encoder_layers else 0),
        "backbone_shape": max(shape.stem, *shape.widths, sum(shape.depths)) if shape else 0,
    }
    for name, size in sizes.items():
        if size > largest:
            raise UserError(f"{path}: {name} {size} is more than anything in the weights, which it does not fit")


def canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformers repository's tensors under the names that its `save_pretrained` writes today."""
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        for pattern, replacement in _SYNONYMS:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _renamed(name: str, rules: _Rules, target: str) -> str:
    for pattern, replacement in rules:
        if match := re.match(pattern, name):
            return match.expand(replacement) + name[match.end() :]
    raise UserError(f"{target} has no place for {name}: a model with this part cannot be converted")


def _layers(config: ModelConfig) -> range:
    return range(config.decoder_layers)
