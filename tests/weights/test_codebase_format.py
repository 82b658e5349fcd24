"""Checkpoints of IDEA-Research/DINO, detrex and mmdetection: names, shapes, settings and errors."""

import argparse

import pytest
import torch

from deformable_detr import DeformableDETR
from deformable_detr.config import presets
from deformable_detr.weights import codebase_format
from deformable_detr.weights.convert import convert
from deformable_detr.weights.finetune import load_for_finetuning
from deformable_detr.weights.key_mapping import to_reference_keys
from tests.support.weights import equal_weights, load_error, tiny_model

CODEBASES = {codebase.name: codebase for codebase in codebase_format.CODEBASES}
DINO = {"backbone": "resnet50", "ffn_dim": 48}
DETREX_EPS = {"box_eps": (1e-3, 1e-3)}
DAB = {"iterative_query_pos": "dab", "class_aware_proposals": True, "query_init": "encoder", "dropout": 0.0}
MODELS = {
    "DINO": ("IDEA-Research/DINO", presets.dino, DINO),
    "DINO, 5 scales": ("IDEA-Research/DINO", presets.dino_5scale, DINO),
    "DINO, Swin": ("IDEA-Research/DINO", presets.dino_swin_l, {**DINO, "backbone": "swin_tiny_patch4_window7_224"}),
    "detrex DINO": ("detrex", presets.dino, {**DINO, "position_encoding": "sine"}),
    "detrex DINO, 5 scales": ("detrex", presets.dino_5scale, {**DINO, "position_encoding": "sine"}),
    "detrex DINO, Swin": (
        "detrex", presets.dino_swin_l,
        {**DINO, "position_encoding": "sine", "backbone": "swin_tiny_patch4_window7_224"},
    ),
    "detrex Deformable DETR": ("detrex", presets.multi_scale, {**DINO, **DETREX_EPS}),
    "detrex refine": ("detrex", presets.refine, {**DINO, **DETREX_EPS}),
    "detrex two-stage": ("detrex", presets.two_stage, {**DINO, **DETREX_EPS}),
    "detrex DAB": ("detrex", presets.refine, {**DINO, **DETREX_EPS, "dropout": 0.0, "iterative_query_pos": "dab"}),
    "detrex DAB two-stage": ("detrex", presets.two_stage, {**DINO, **DETREX_EPS, **DAB}),
    "mmdetection DINO": ("mmdetection", presets.dino, {**DINO, "box_eps": (1e-5, 1e-3)}),
    "mmdetection DINO, 5 scales, Swin": (
        "mmdetection", presets.dino_5scale,
        {**DINO, "box_eps": (1e-5, 1e-3), "backbone": "swin_tiny_patch4_window7_224", "frozen_stages": 0},
    ),
    "mmdetection Deformable DETR": ("mmdetection", presets.multi_scale, DINO),
    "mmdetection refine": ("mmdetection", presets.refine, DINO),
    "mmdetection two-stage": ("mmdetection", presets.two_stage, DINO),
}  # fmt: skip

# Keys as the codebases' modules name them, from their source.
NAMES = {
    "DINO": (
        "backbone.0.body.layer3.5.bn3.running_var", "input_proj.3.0.weight", "transformer.level_embed",
        "transformer.encoder.layers.0.self_attn.value_proj.weight", "transformer.encoder.layers.0.linear2.bias",
        "transformer.decoder.layers.1.cross_attn.sampling_offsets.weight", "transformer.decoder.layers.1.norm3.bias",
        "transformer.decoder.layers.0.self_attn.in_proj_weight", "transformer.decoder.norm.weight",
        "transformer.decoder.ref_point_head.layers.1.weight", "transformer.tgt_embed.weight",
        "transformer.enc_output.weight", "transformer.enc_output_norm.bias", "transformer.enc_out_class_embed.weight",
        "transformer.enc_out_bbox_embed.layers.2.bias", "transformer.decoder.bbox_embed.1.layers.0.weight",
        "transformer.decoder.class_embed.1.bias", "class_embed.1.bias", "bbox_embed.0.layers.2.weight",
    ),
    "DINO, Swin": (
        "backbone.0.patch_embed.proj.weight", "backbone.0.patch_embed.norm.bias",
        "backbone.0.layers.0.downsample.reduction.weight", "backbone.0.layers.2.blocks.5.attn.qkv.weight",
        "backbone.0.layers.3.blocks.1.attn.relative_position_bias_table", "backbone.0.layers.1.blocks.0.mlp.fc2.bias",
        "backbone.0.norm1.weight", "backbone.0.norm3.weight",
    ),
    "detrex DINO": (
        "backbone.stem.conv1.weight", "backbone.stem.conv1.norm.running_mean", "backbone.res2.0.shortcut.weight",
        "backbone.res5.2.conv3.norm.bias", "backbone.res3.0.shortcut.norm.weight", "neck.convs.2.conv.weight",
        "neck.convs.0.norm.bias", "neck.extra_convs.0.conv.bias", "transformer.level_embeds",
        "transformer.encoder.layers.0.attentions.0.attention_weights.bias",
        "transformer.encoder.layers.0.ffns.0.layers.0.0.weight", "transformer.encoder.layers.0.ffns.0.layers.1.weight",
        "transformer.encoder.layers.0.norms.1.bias", "transformer.decoder.layers.0.attentions.0.attn.in_proj_weight",
        "transformer.decoder.layers.1.attentions.0.attn.out_proj.bias", "transformer.tgt_embed.weight",
        "transformer.decoder.layers.1.attentions.1.output_proj.weight", "transformer.decoder.layers.0.norms.2.weight",
        "transformer.decoder.ref_point_head.layers.0.weight", "transformer.decoder.norm.bias", "class_embed.2.weight",
        "transformer.enc_output_norm.weight", "transformer.decoder.class_embed.2.weight", "bbox_embed.2.layers.0.bias",
    ),
    "detrex Deformable DETR": ("query_embedding.weight", "transformer.reference_points.bias", "class_embed.1.bias"),
    "detrex two-stage": ("transformer.pos_trans.weight", "transformer.pos_trans_norm.bias"),
    "detrex DAB": ("tgt_embed.weight", "refpoint_embed.weight", "transformer.decoder.query_scale.layers.1.weight"),
    "mmdetection DINO": (
        "backbone.conv1.weight", "backbone.layer4.2.bn3.weight", "backbone.layer2.0.downsample.1.running_var",
        "neck.convs.0.conv.weight", "neck.convs.2.gn.bias", "neck.extra_convs.0.gn.weight", "level_embed",
        "query_embedding.weight", "memory_trans_fc.bias", "memory_trans_norm.weight",
        "encoder.layers.0.self_attn.sampling_offsets.bias", "encoder.layers.0.ffn.layers.0.0.weight",
        "encoder.layers.0.norms.1.weight", "decoder.layers.1.self_attn.attn.in_proj_bias",
        "decoder.layers.0.cross_attn.value_proj.weight", "decoder.layers.1.ffn.layers.1.bias",
        "decoder.layers.1.norms.2.bias", "decoder.ref_point_head.layers.1.weight", "decoder.norm.weight",
        "bbox_head.cls_branches.2.weight", "bbox_head.reg_branches.2.4.bias", "bbox_head.reg_branches.0.0.weight",
    ),
    "mmdetection DINO, 5 scales, Swin": (
        "backbone.patch_embed.projection.weight", "backbone.patch_embed.norm.weight", "backbone.norm0.bias",
        "backbone.stages.2.blocks.5.attn.w_msa.qkv.bias", "backbone.stages.0.blocks.1.ffn.layers.0.0.weight",
        "backbone.stages.3.blocks.1.attn.w_msa.relative_position_bias_table", "backbone.norm3.weight",
        "backbone.stages.1.blocks.0.ffn.layers.1.weight", "backbone.stages.0.downsample.norm.weight",
    ),
    "mmdetection Deformable DETR": ("reference_points_fc.weight", "bbox_head.cls_branches.1.bias"),
    "mmdetection two-stage": ("pos_trans_fc.weight", "pos_trans_norm.bias"),
}  # fmt: skip


def checkpoint_of(name):
    """Return a model, its tensors under the codebase's keys, and a file's other values that tell the heads."""
    codebase_name, preset, changes = MODELS[name]
    codebase = CODEBASES[codebase_name]
    model = tiny_model(preset, **changes)
    state = model.state_dict()
    tensors = to_reference_keys(state, codebase.placements(state, model.config), all_copies=True)
    for key, value in tensors.items():  # the inverse of `to_our_form`
        if key.endswith("ref_point_head.layers.0.weight"):
            x, y, *size = value.chunk(4, dim=1)
            tensors[key] = torch.cat((y, x, *size), dim=1)
        elif codebase_name == "mmdetection" and ".downsample." in key and ".stages." in key:
            tensors[key] = value.unflatten(-1, (2, 2, -1)).transpose(-1, -3).flatten(-3)
    others = {}
    if codebase_name == "IDEA-Research/DINO":
        others = {"args": argparse.Namespace(nheads=4, pe_temperatureH=20, pe_temperatureW=20, pre_norm=False)}
    elif codebase_name == "mmdetection":
        encoding = "num_feats=32,\n normalize=True,\n offset=-0.5,\n temperature=10000"
        if "DINO" in name:
            encoding = "num_feats=32, normalize=True, offset=0.0, temperature=20"
        text = f"backbone=dict(num_heads=[3, 6]), positional_encoding=dict({encoding}), self_attn_cfg=dict(num_heads=4)"
        others = {"meta": {"cfg": text, "dataset_meta": {"classes": ("cat", "dog", "cow")}}}
    return model, tensors, others


def stated_for(model, name):
    stated = {"num_heads": 4}
    if model.config.two_stage and model.config.query_init != "learned":
        stated["num_queries"] = 20
    return stated if MODELS[name][0] == "detrex" or "num_queries" in stated else {}


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_loads_with_its_config(name, tmp_path):
    model, tensors, others = checkpoint_of(name)
    assert not [key for key in NAMES.get(name, ()) if key not in tensors]
    path = tmp_path / "model.pth"
    torch.save({"model": tensors, "ema_model": {}, **others}, path)
    loaded = DeformableDETR.from_pretrained(path, **stated_for(model, name))
    assert equal_weights(model, loaded)
    same = {"class_names", "category_ids", "pixel_mean", "pixel_std", "look_forward_twice", "backbone_norm"}
    expected = model.config.without_pretrained_backbone().model_dump(exclude={*same, "frozen_stages"})
    assert loaded.config.model_dump(exclude={*same, "frozen_stages"}) == expected
    assert loaded.config.look_forward_twice == ("DINO" in name)
    if MODELS[name][0] == "mmdetection":
        assert loaded.config.class_names == ("cat", "dog", "cow")


@pytest.mark.parametrize("name", ["DINO", "detrex DINO", "mmdetection DINO"])
def test_unknown_and_missing_tensors_are_named(name, tmp_path):
    model, tensors, others = checkpoint_of(name)
    path = tmp_path / "model.pth"
    stated = stated_for(model, name)
    torch.save({"model": {**tensors, "transformer.surplus.weight": torch.zeros(1)}, **others}, path)
    with pytest.raises(Exception, match=r"does not call for: transformer\.surplus\.weight"):
        DeformableDETR.from_pretrained(path, **stated)
    lost = next(key for key in tensors if key.endswith("norm.bias") and "decoder" in key)
    torch.save({"model": {key: value for key, value in tensors.items() if key != lost}, **others}, path)
    with pytest.raises(Exception, match=f"lacks {lost}"):
        DeformableDETR.from_pretrained(path, **stated)


def test_what_only_training_reads_is_left_out_by_name(tmp_path):
    model, tensors, others = checkpoint_of("DINO, Swin")
    path = tmp_path / "model.pth"
    tensors |= {"label_enc.weight": torch.zeros(92, 64)}
    tensors |= {"backbone.0.layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.long)}
    torch.save({"model": tensors, "ema_model": tensors, **others}, path)
    lines = convert(path, "native", tmp_path / "native")
    assert lines[:2] == [
        f"{path}: took the weights under 'model'; those under 'ema_model' are not read",
        f"{path}: label_enc.weight, which only training reads, is left out",
    ]
    assert equal_weights(model, DeformableDETR.from_pretrained(tmp_path / "native"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pe_temperatureH": 10000}, "pe_temperatureH and W 20"),
        ({"pre_norm": True}, "pre_norm False"),
        ({"transformer_activation": "gelu"}, "transformer_activation 'relu'"),
        ({"decoder_module_seq": ["ca", "sa", "ffn"]}, "decoder_module_seq"),
    ],
)
def test_other_settings_are_refused(changes, message, tmp_path):
    _, tensors, others = checkpoint_of("DINO")
    path = tmp_path / "model.pth"
    torch.save({"model": tensors, "args": {**vars(others["args"]), **changes}}, path)
    assert f"its settings differ from {message}" in load_error(path)


def test_untold_heads_come_from_the_config_when_fine_tuning(tmp_path):
    model, tensors, _ = checkpoint_of("detrex DINO")
    path = tmp_path / "model.pth"
    torch.save(tensors, path)
    assert "does not tell num_heads;" in load_error(path)
    lines = []
    config = replace_classes(model.config)
    load_for_finetuning(config, path, log=lines.append)
    assert lines[0] == f"{path} does not tell num_heads: read with this run's num_heads 4"
    assert "loaded" in lines[1]


def replace_classes(config):
    return config.replace(num_classes=2, class_names=("a", "b"), category_ids=(0, 1))


@pytest.mark.parametrize("count", [91, 80, 3])
def test_coco_models_have_names_and_ids(count, tmp_path):
    model = tiny_model(presets.dino, **DINO, num_classes=count, class_names=(), category_ids=())
    codebase = CODEBASES["detrex"]
    state = model.state_dict()
    path = tmp_path / "model.pth"
    torch.save(to_reference_keys(state, codebase.placements(state, model.config), all_copies=True), path)
    config = DeformableDETR.from_pretrained(path, num_heads=4).config
    assert len(config.class_names) == (0 if count == 3 else count)
    assert config.category_ids[-1] == (2 if count == 3 else 90)
    assert not config.class_names or config.class_names[-1] == "toothbrush"


def test_a_backbone_of_another_kind_is_refused(tmp_path):
    _, tensors, others = checkpoint_of("DINO")
    path = tmp_path / "model.pth"
    other = {key.replace("backbone.0.body.layer", "backbone.0.stages."): value for key, value in tensors.items()}
    torch.save({"model": other, **others}, path)
    assert "has a backbone that is not supported here; these are: resnet50" in load_error(path)


def test_markers_tell_the_codebases_apart():
    names = [MODELS[name][0] for name in ("DINO", "detrex refine", "mmdetection refine")]
    for name, model in zip(names, ("DINO", "detrex refine", "mmdetection refine"), strict=True):
        found = codebase_format.find_codebase(checkpoint_of(model)[1])
        assert found is not None
        assert found.name == name
    assert codebase_format.find_codebase({"transformer.level_embed": torch.zeros(1)}) is None


def test_projections_of_mmdetection_without_bias_get_zeros(tmp_path):
    model, tensors, others = checkpoint_of("mmdetection DINO")
    path = tmp_path / "model.pth"
    without = {k: v for k, v in tensors.items() if not (k.startswith("neck.") and k.endswith("conv.bias"))}
    assert len(tensors) - len(without) == 4
    torch.save({"state_dict": without, **others}, path)
    loaded = DeformableDETR.from_pretrained(path)
    state = {name: value for name, value in model.state_dict().items() if "projections" in name}
    for name, value in state.items():
        expected = torch.zeros_like(value) if name.endswith(".0.bias") else value
        assert torch.equal(loaded.state_dict()[name], expected)
