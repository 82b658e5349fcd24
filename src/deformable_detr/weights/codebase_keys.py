"""State-dict keys of IDEA-Research/DINO, detrex and mmdetection."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from ..config.schema import ModelConfig
from ..model.backbone import backbone_strides
from .key_mapping import OFFICIAL_KEYS, Placements, head_copies, translate

# timm's key prefix inside a Swin Transformer → the original's; the norms of the outputs are numbered by stage.
_SWIN_KEYS = {
    "patch_embed.": "patch_embed.",
    "layers_*.downsample.": "layers.*-1.downsample.",
    "layers_*.": "layers.*.",
}
_MMDET_SWIN_KEYS = {
    "patch_embed.proj.": "patch_embed.projection.",
    "patch_embed.": "patch_embed.",
    "layers_*.downsample.": "stages.*-1.downsample.",
    "layers_*.blocks.*.attn.": "stages.*.blocks.*.attn.w_msa.",
    "layers_*.blocks.*.mlp.fc1.": "stages.*.blocks.*.ffn.layers.0.0.",
    "layers_*.blocks.*.mlp.fc2.": "stages.*.blocks.*.ffn.layers.1.",
    "layers_*.": "stages.*.",
}
_DETECTRON2_RESNET_KEYS = {
    "conv1.": "stem.conv1.",
    "bn1.": "stem.conv1.norm.",
    "layer*.*.conv*.": "res*+1.*.conv*.",
    "layer*.*.bn*.": "res*+1.*.conv*.norm.",
    "layer*.*.downsample.0.": "res*+1.*.shortcut.",
    "layer*.*.downsample.1.": "res*+1.*.shortcut.norm.",
}


def _first(*tables: Mapping[str, str]) -> dict[str, str]:
    """Merge tables; of equal keys the first table's wins, in value and order."""
    return {key: value for table in (*tables, *reversed(tables)) for key, value in table.items()}


def _inside(ours: str, theirs: str, *tables: Mapping[str, str]) -> dict[str, str]:
    return {ours + key: theirs + value for table in tables for key, value in table.items()}


# As in `key_mapping`: our key prefix → theirs; the first match wins, "*" stands for a number.
DINO_KEYS = _first(
    _inside("backbone.body.", "backbone.0.", _SWIN_KEYS),
    {
        "proposals.query_embedding.": "transformer.tgt_embed.",
        "decoder.norm.": "transformer.decoder.norm.",
        "decoder.position_head.": "transformer.decoder.ref_point_head.",
    },
    OFFICIAL_KEYS,
)

_DETREX_ONLY_KEYS = {
    **_inside("backbone.body.", "backbone.", _SWIN_KEYS, _DETECTRON2_RESNET_KEYS),
    "projections.levels.*.0.": "neck.convs.*.conv.",
    "projections.levels.*.1.": "neck.convs.*.norm.",
    "level_embedding": "transformer.level_embeds",
    "proposals.query_embedding.": "transformer.tgt_embed.",
    "query_boxes.": "refpoint_embed.",
    "query_embedding.": "query_embedding.",
    "encoder.layers.*.self_attn.": "transformer.encoder.layers.*.attentions.0.",
    "decoder.layers.*.self_attn.": "transformer.decoder.layers.*.attentions.0.attn.",
    "decoder.layers.*.cross_attn.": "transformer.decoder.layers.*.attentions.1.",
    "decoder.norm.": "transformer.decoder.norm.",
    "decoder.position_head.scale.": "transformer.decoder.query_scale.",
    "decoder.position_head.": "transformer.decoder.ref_point_head.",
    **{
        f"{part}.layers.*.{ours}.": f"transformer.{part}.layers.*.{theirs}."
        for part in ("encoder", "decoder")
        for ours, theirs in {
            "ffn.linear1": "ffns.0.layers.0.0", "ffn.linear2": "ffns.0.layers.1", "norm*": "norms.*-1",
        }.items()
    },
}  # fmt: skip
DETREX_KEYS = _first(_DETREX_ONLY_KEYS, OFFICIAL_KEYS)

MMDET_KEYS = {
    **_inside("backbone.body.", "backbone.", _MMDET_SWIN_KEYS),
    "backbone.body.": "backbone.",
    "projections.levels.*.0.": "neck.convs.*.conv.",
    "projections.levels.*.1.": "neck.convs.*.gn.",
    "level_embedding": "level_embed",
    "proposals.query_embedding.": "query_embedding.",
    "query_embedding.": "query_embedding.",
    "reference_points.": "reference_points_fc.",
    "proposals.memory_proj.": "memory_trans_fc.",
    "proposals.memory_norm.": "memory_trans_norm.",
    "proposals.query_proj.": "pos_trans_fc.",
    "proposals.query_norm.": "pos_trans_norm.",
    "decoder.layers.*.self_attn.": "decoder.layers.*.self_attn.attn.",
    "decoder.norm.": "decoder.norm.",
    "decoder.position_head.": "decoder.ref_point_head.",
    "decoder.heads.classes.": "bbox_head.cls_branches.",
    **{f"decoder.heads.boxes.*.layers.{i}.": f"bbox_head.reg_branches.*.{2 * i}." for i in range(3)},
    **{
        f"{part}.layers.*.{ours}.": f"{part}.layers.*.{theirs}."
        for part in ("encoder", "decoder")
        for ours, theirs in {
            "ffn.linear1": "ffn.layers.0.0", "ffn.linear2": "ffn.layers.1", "norm*": "norms.*-1",
        }.items()
    },
    "encoder.layers.": "encoder.layers.",
    "decoder.layers.": "decoder.layers.",
}  # fmt: skip

# Training's class embedding of denoising queries, and an index that Swin Transformers compute from their window size.
TRAINING_ONLY = ("label_enc.weight", "dn_query_generator.label_embedding.weight")
COMPUTED = ".relative_position_index"


def dino_placements(names: Iterable[str], config: ModelConfig) -> Placements:
    """Place our tensors in a checkpoint of IDEA-Research/DINO."""
    layers = config.decoder_layers
    encoder_heads = {
        f"decoder.heads.{ours}.{layers}.": f"transformer.enc_out_{theirs}_embed."
        for ours, theirs in {"classes": "class", "boxes": "bbox"}.items()
    }
    table = _first(encoder_heads, _output_norms("backbone.0.", config), DINO_KEYS)
    return _placements(names, table, config, "transformer")


def detrex_placements(names: Iterable[str], config: ModelConfig) -> Placements:
    """Place our tensors in a checkpoint of detrex."""
    content = {"query_embedding.": "tgt_embed."} if config.iterative_query_pos else {}
    table = _first(content, _extra_levels(config, "norm"), _output_norms("backbone.", config), DETREX_KEYS)
    return _placements(names, table, config, "transformer")


def mmdet_placements(names: Iterable[str], config: ModelConfig) -> Placements:
    """Place our tensors in a checkpoint of mmdetection 3."""
    table = _first(_extra_levels(config, "gn"), _output_norms("backbone.", config), MMDET_KEYS)
    return _placements(names, table, config, None)


def _placements(names: Iterable[str], table: Mapping[str, str], config: ModelConfig, root: str | None) -> Placements:
    keys = {name: translate(name, table, "this format") for name in names}
    return {name: [(copy,) for copy in head_copies(key, root, config)] for name, key in keys.items()}


def _extra_levels(config: ModelConfig, norm: str) -> dict[str, str]:
    """Keys of the projections to levels that the backbone lacks."""
    own = len(backbone_strides(config))
    rows: dict[str, str] = {}
    for level in range(own, config.num_feature_levels):
        for index, part in enumerate(("conv", norm)):
            rows[f"projections.levels.{level}.{index}."] = f"neck.extra_convs.{level - own}.{part}."
    return rows


def _output_norms(prefix: str, config: ModelConfig) -> dict[str, str]:
    count = len(backbone_strides(config))
    return {f"backbone.body.norms.{i}.": f"{prefix}norm{4 - count + i}." for i in range(count)}


def to_our_form(tensors: Mapping[str, Tensor], from_mmdet: bool) -> dict[str, Tensor]:
    """Reorder inputs of linear layers, and add zeros for the biases that mmdetection's projections may lack.

    Box coordinates are (y, x, w, h) everywhere. mmdetection merges Swin Transformers' patches in another order.
    """
    ordered = dict(tensors)
    for key, value in tensors.items():
        if key.endswith("ref_point_head.layers.0.weight") and value.ndim == 2 and value.shape[1] % 4 == 0:
            ordered[key] = value.unflatten(1, (4, -1))[:, [1, 0, 2, 3]].flatten(1)
        elif from_mmdet and key.startswith("neck.") and key.endswith(".conv.weight"):
            ordered.setdefault(key.removesuffix("weight") + "bias", value.new_zeros(len(value)))
        elif from_mmdet and ".downsample." in key and key.startswith("backbone.stages."):
            # (…, C, rows, columns) → (…, columns, rows, C)
            ordered[key] = value.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)
    return ordered
