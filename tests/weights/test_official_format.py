"""Checkpoints of the paper authors' code: reading, writing, and parity with that code."""

import argparse
import re
import types

import pytest
import torch

from deformable_detr import DeformableDETR, UserError
from deformable_detr.config import presets
from deformable_detr.model.postprocess import postprocess
from deformable_detr.weights import official_format
from deformable_detr.weights.convert import convert
from tests.support.authors_code import checkout, importable, in_precision, use_python_op
from tests.support.parity import batch, randomized
from tests.support.weights import equal_weights, load_error, official_values, tiny_model

PRESETS = [name for name in presets.PRESETS if not name.startswith(("small", "dino"))]
EQUAL = None


def with_args(values, **changes):
    return {**values, "args": argparse.Namespace(**{**vars(values["args"]), **changes})}


def with_tensors(values, **tensors):
    return {**values, "model": {**values["model"], **tensors}}


CHANGES = {
    "unchanged": (lambda v: v, EQUAL),
    "settings as a dict": (lambda v: {**v, "args": vars(v["args"])}, EQUAL),
    "settings with tensors": (
        lambda v: with_args(v, position_embedding=torch.zeros(3), dec_layers=torch.ones(2)),
        EQUAL,
    ),
    "nested settings": (lambda v: with_args(v, nested=argparse.Namespace(a=argparse.Namespace(b=[1]))), EQUAL),
    "EMA weights": (lambda v: {"model_ema": v["model"], "args": v["args"], "epoch": 3}, EQUAL),
    "EMA weights in a module": (lambda v: {"ema": {"module": v["model"]}, "args": v["args"]}, EQUAL),
    "prefix and profiler buffers": (
        lambda v: {
            **v,
            "model": {f"module.{n}": t for n, t in v["model"].items()}
            | {"module.transformer.total_ops": torch.ones(1)},
        },
        EQUAL,
    ),
    "optimizer": (lambda v: {**v, "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "epoch": 49}, EQUAL),
    "invalid embedded config": (lambda v: {**v, official_format.OWN_CONFIG: {"model": {"num_classes": "x"}}}, EQUAL),
    "embedded config with other classes": (
        lambda v: {**v, official_format.OWN_CONFIG: {"model": {"num_classes": 9, "category_ids": list(range(9))}}},
        EQUAL,
    ),
    "heads as a word": (lambda v: with_args(v, nheads="eight"), "eight"),
    "no heads": (lambda v: with_args(v, nheads=0), "zero"),
    "negative heads": (lambda v: with_args(v, nheads=-8), "num_heads|point"),
    "other levels": (lambda v: with_args(v, num_feature_levels=1), "its settings have num_feature_levels 1"),
    "other layers": (lambda v: with_args(v, dec_layers=6), "its settings have dec_layers 6"),
    "other width": (lambda v: with_args(v, hidden_dim=256), "its settings have hidden_dim 256"),
    "no refinement": (lambda v: with_args(v, with_box_refine=False), "its settings have with_box_refine False"),
    "another backbone": (lambda v: with_args(v, backbone="resnet101"), "lacks|no tensor is as large"),
    "unknown backbone": (lambda v: with_args(v, backbone="swin_t"), "swin_t"),
    "half the tensors": (lambda v: {**v, "model": dict(list(v["model"].items())[::2])}, "lacks|not a complete"),
    "no levels": (lambda v: {**v, "model": {n: t for n, t in v["model"].items() if "level" not in n}}, "level_embed"),
    "level embedding of another shape": (
        lambda v: with_tensors(v, **{"transformer.level_embed": torch.zeros(4)}),
        "not a complete",
    ),
    "huge number of layers": (
        lambda v: with_tensors(v, **{"transformer.decoder.layers.99999999.x": torch.zeros(1)}),
        "its settings have dec_layers",
    ),
    "tensor larger than its data": (
        lambda v: with_tensors(v, **{"transformer.level_embed": torch.zeros(1).expand(10**6, 10**6)}),
        "less data",
    ),
    "no state dict": (lambda v: {"args": v["args"], "epoch": 1}, "not a tensor"),
    "empty": (lambda v: {}, "no dict"),
    "inconsistent copies": (
        lambda v: with_tensors(v, **{"transformer.decoder.bbox_embed.0.layers.2.bias": torch.ones(4)}),
        "differ",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_checkpoint_loads_equal_or_fails_in_one_line(
    name, official_model, shared_checkpoint, tiny_backbone, tmp_path
):
    change, message = CHANGES[name]
    path = tmp_path / "checkpoint.pth"
    torch.save(change(official_values(shared_checkpoint)), path)
    if message is EQUAL:
        model = DeformableDETR.from_pretrained(path)
        assert all(torch.equal(value, official_model.state_dict()[key]) for key, value in model.state_dict().items())
        return
    error = load_error(path)
    assert re.search(message, error), error
    assert str(path) in error


def test_resnet50_checkpoint_with_and_without_settings(tmp_path):
    """Without settings, the number of heads is unknown and has to be stated."""
    expected = tiny_model(presets.multi_scale, backbone="resnet50", num_heads=8)
    official_format.save(expected, tmp_path)
    path = tmp_path / official_format.FILE
    values = official_values(path)
    torch.save(values, path, _use_new_zipfile_serialization=False)
    model = DeformableDETR.from_pretrained(tmp_path)  # a folder with only the checkpoint
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    config = model.config
    assert (config.refine, config.num_feature_levels, config.num_queries, config.category_ids) == (
        False,
        4,
        20,
        (0, 1, 2),
    )
    torch.save(values["model"], path)
    assert (
        "does not tell num_heads; state the values of its training in convert or train: --set model.num_heads=8"
        in load_error(path)
    )
    bare = DeformableDETR.from_pretrained(path, num_heads=8)
    assert equal_weights(model, bare)
    assert (bare.config.num_heads, bare.config.encoder_points, bare.config.backbone) == (8, 4, "resnet50")


@pytest.mark.parametrize(
    ("preset", "stated"),
    [
        (presets.single_scale, {"num_heads": 4, "dilation": False}),
        (presets.single_scale_dc5, {"num_heads": 4, "dilation": True}),
        (presets.two_stage, {"num_heads": 4, "num_queries": 20}),
    ],
)
def test_what_no_shape_tells_has_to_be_stated(preset, stated, tmp_path):
    expected = tiny_model(preset, backbone="resnet50", hidden_dim=256)
    official_format.save(expected, tmp_path)
    path = tmp_path / official_format.FILE
    torch.save({"model_ema": official_values(path)["model"]}, path)
    assert f"does not tell {' and '.join(stated)};" in load_error(path)
    model = DeformableDETR.from_pretrained(path, **stated)
    assert equal_weights(model, expected)
    assert all(getattr(model.config, name) == value for name, value in stated.items())
    with pytest.raises(UserError, match="num_heads must be a positive integer, not 'four'"):
        DeformableDETR.from_pretrained(path, **{**stated, "num_heads": "four"})
    lines = convert(path, "native", tmp_path / "native", stated)
    assert lines[0] == f"{path}: took the weights under 'model_ema'"


def test_91_classes_get_the_names_and_ids_of_coco(tiny_backbone, tmp_path):
    official_format.save(tiny_model(presets.multi_scale, num_classes=91, class_names=(), category_ids=()), tmp_path)
    path = tmp_path / official_format.FILE
    torch.save(official_values(path), path)
    config = DeformableDETR.from_pretrained(path).config
    assert config.category_ids == tuple(range(91))
    assert [config.class_names[label] for label in (0, 1, 12, 13, 90)] == [
        "N/A", "person", "N/A", "stop sign", "toothbrush",
    ]  # fmt: skip
    assert len({name for name in config.class_names if name != "N/A"}) == 80


def test_invalid_files_are_reported(tmp_path):
    (tmp_path / "image.pth").write_bytes(b"\x89PNG")
    torch.save({"model": {"backbone.weight": torch.zeros(1)}}, tmp_path / "detr.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    for name, message in (
        ("image", "damaged"),
        ("detr", "not a complete checkpoint"),
        ("list", "no dict"),
    ):
        assert message in load_error(tmp_path / f"{name}.pth")


def test_written_keys_and_settings(tiny_backbone, tmp_path):
    model = tiny_model(hidden_dim=256)
    official_format.save(model, tmp_path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        values = torch.load(tmp_path / official_format.FILE, weights_only=True)
    names, args = values["model"], values["args"]
    for name in (
        "transformer.level_embed", "transformer.encoder.layers.0.self_attn.sampling_offsets.weight",
        "transformer.encoder.layers.0.linear1.weight", "transformer.decoder.layers.1.cross_attn.value_proj.bias",
        "transformer.decoder.layers.1.self_attn.in_proj_weight", "transformer.decoder.layers.1.norm3.bias",
        "transformer.decoder.bbox_embed.2.layers.2.weight", "transformer.decoder.class_embed.2.bias",
        "bbox_embed.2.layers.2.weight", "class_embed.2.bias", "transformer.enc_output.weight",
        "transformer.enc_output_norm.bias", "transformer.pos_trans.weight", "transformer.pos_trans_norm.weight",
        "input_proj.3.0.weight", "input_proj.3.1.bias",
    ):  # fmt: skip
        assert name in names, name
    assert not [name for name in names if name.startswith(("decoder", "encoder", "proposals", "projections"))]
    assert (args.with_box_refine, args.two_stage, args.num_queries, args.dec_layers) == (True, True, 20, 2)
    layer = model.decoder.layers[0]  # the official decoder numbers its norms differently
    assert torch.equal(names["transformer.decoder.layers.0.norm2.weight"], layer.norm1.weight)
    assert torch.equal(names["transformer.decoder.layers.0.norm1.weight"], layer.norm2.weight)


# --- parity with a checkout of the official code -----------------------------------------------------------


@pytest.fixture(scope="module")
def official_code():
    """Functions of a checkout of the paper authors' repository."""
    folder = checkout("DEFORMABLE_DETR_OFFICIAL", "models/deformable_detr.py")
    with importable(folder, "models", "util") as patch:
        yield load_official(patch)


def load_official(patch):
    import torchvision

    patch.setattr(torchvision, "__version__", "0.9.0")  # the official code compares the first three characters
    from models import (  # type: ignore[import-not-found]
        backbone,
        deformable_detr,
        deformable_transformer,
        position_encoding,
    )
    from models.ops.functions import ms_deform_attn_func  # type: ignore[import-not-found]
    from models.ops.modules import ms_deform_attn  # type: ignore[import-not-found]
    from util.misc import NestedTensor  # type: ignore[import-not-found]

    use_python_op(patch, ms_deform_attn_func, ms_deform_attn)

    def build(args, classes):
        return deformable_detr.DeformableDETR(
            backbone.build_backbone(args), deformable_transformer.build_deforamble_transformer(args),
            num_classes=classes, num_queries=args.num_queries, num_feature_levels=args.num_feature_levels,
            aux_loss=True, with_box_refine=args.with_box_refine, two_stage=args.two_stage,
        )  # fmt: skip

    return types.SimpleNamespace(
        build=build,
        Nested=NestedTensor,
        PostProcess=deformable_detr.PostProcess,
        precision=lambda dtype: in_precision(dtype, position_encoding, deformable_transformer),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_official_code_gives_equal_outputs(official_code, name, tmp_path):
    """Full size, with checkpoints written by the official modules and by us."""
    torch.manual_seed(0)
    model = randomized(DeformableDETR(presets.PRESETS[name](backbone_weights="none")))
    official_format.save(model, tmp_path)
    values = torch.load(tmp_path / official_format.FILE, weights_only=False)
    theirs = official_code.build(values["args"], 91)
    torch.save({"model": randomized(theirs, seed=2).state_dict(), "args": values["args"]}, tmp_path / "theirs.pth")
    for path in (tmp_path / "theirs.pth", tmp_path / official_format.FILE):
        theirs.float().load_state_dict(torch.load(path, weights_only=False)["model"], strict=True)
        ours = DeformableDETR.from_pretrained(path)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
            pixels, mask = batch(dtype)
            with torch.no_grad(), official_code.precision(dtype):
                actual = ours.to(dtype)(pixels, mask)
                expected = theirs.to(dtype).eval()(official_code.Nested(pixels, mask))
            pairs = {"logits": ("pred_logits", actual["pred_logits"]), "boxes": ("pred_boxes", actual["pred_boxes"])}
            for output, (key, value) in pairs.items():
                assert (expected[key] - value).abs().max() <= tolerance, output
            for layer, outputs in enumerate(expected["aux_outputs"]):
                assert (outputs["pred_logits"] - actual["layer_logits"][layer]).abs().max() <= tolerance
                assert (outputs["pred_boxes"] - actual["layer_boxes"][layer]).abs().max() <= tolerance
            if name == "two-stage":
                proposals = expected["enc_outputs"]
                assert (proposals["pred_logits"] - actual["encoder_logits"]).abs().max() <= tolerance
            assert expected["pred_logits"].std() > 0.1
            sizes = torch.tensor([[480, 640], [300, 500], [333, 444]])
            for theirs_selected, selected in zip(
                official_code.PostProcess()(expected, sizes), postprocess(expected, sizes.tolist()), strict=True
            ):
                assert torch.equal(theirs_selected["scores"], selected.scores)
                assert torch.equal(theirs_selected["labels"], selected.labels)
                assert torch.equal(theirs_selected["boxes"], selected.boxes)
