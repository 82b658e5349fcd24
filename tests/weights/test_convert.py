"""Models written in other formats and read again: not a bit changes; what has no place there is refused."""

import argparse
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from deformable_detr import DeformableDETR, UserError
from deformable_detr.config import presets
from deformable_detr.model.postprocess import postprocess
from deformable_detr.weights import official_format, transformers_format
from deformable_detr.weights.convert import convert, not_convertible
from deformable_detr.weights.convert import write as convert_model
from tests.model.test_parity import batch, randomized, transformers
from tests.weights.test_load import OURS, ours, same

PAPER = [name for name in presets.PRESETS if not name.startswith("small")]


def big_enough(name: str, **changes) -> DeformableDETR:
    """A small model that the official code has too: its backbone, and its width for two-stage."""
    torch.manual_seed(0)
    widths = {"hidden_dim": 256, "num_heads": 8} if name == "two-stage" else {}
    values = {**OURS, "backbone": "resnet50", **widths, **changes}
    return randomized(DeformableDETR(presets.PRESETS[name](**values)))


LITE = {"backbone": "tf_efficientnet_lite0", "hidden_dim": 128}
THERE = [*((name, "frozen", {}) for name in PAPER), ("two-stage", "train", {}), ("small-portable", "frozen", LITE)]


@pytest.mark.parametrize(("name", "norm", "changes"), THERE)
def test_to_transformers_and_back(name, norm, changes, tmp_path):
    sizes = {"image_size": 320, "size_divisor": 32}
    model = ours(presets.PRESETS[name], backbone_norm=norm, dropout=0.0, **sizes, **changes)
    counted = [name for name in model.state_dict() if name.endswith("num_batches_tracked")]
    assert bool(counted) == (norm == "train")
    model.load_state_dict({**model.state_dict(), **{name: torch.tensor(7 + i) for i, name in enumerate(counted)}})
    model.save_pretrained(tmp_path / "ours")
    lines = convert(tmp_path / "ours", "transformers", tmp_path / "theirs")
    assert lines[1] == "it gives the same logits and boxes in transformers as here"
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip
    convert(tmp_path / "theirs", "ours", tmp_path / "back")
    back = DeformableDETR.from_pretrained(tmp_path / "back")
    assert same(model, back)
    assert "note: it was trained on images whose sides are multiples of 32" in lines[2]
    was, now = model.config.without_pretrained_backbone().model_dump(), back.config.model_dump()
    # The backbone is named in transformers' way, and statistics that were the backbone's own are said.
    assert {key for key in was if was[key] != now[key]} <= {"backbone", "backbone_shape", "pixel_mean", "pixel_std"}
    assert torch.equal(back.pixel_mean, model.pixel_mean)


@pytest.mark.parametrize(("name", "norm"), [*((name, "frozen") for name in PAPER), ("two-stage", "train")])
def test_to_the_official_format_and_back(name, norm, tmp_path):
    model = big_enough(name, backbone_norm=norm, image_size=320, size_divisor=32)
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            value.fill_(5)
    model.save_pretrained(tmp_path / "ours")
    lines = convert(tmp_path / "ours", "official", tmp_path / "theirs")
    assert any("num_classes = 3" in line for line in lines)
    assert any("multiples of 32" in line for line in lines)
    convert(tmp_path / "theirs" / official_format.FILE, "ours", tmp_path / "back")
    back = DeformableDETR.from_pretrained(tmp_path / "back")
    assert same(model, back)
    assert back.config == model.config.without_pretrained_backbone()


def test_what_the_official_file_holds(tmp_path):
    """Its names, with both names of the heads that the decoder uses as well, and settings that its parser knows."""
    official_format.save(big_enough("two-stage"), tmp_path)
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
        "input_proj.3.0.weight", "input_proj.3.1.bias", "backbone.0.body.conv1.weight",
        "backbone.0.body.layer4.0.downsample.1.running_var",
    ):  # fmt: skip
        assert name in names, name
    assert not [name for name in names if name.startswith(("decoder", "encoder", "proposals", "projections"))]
    assert (args.with_box_refine, args.two_stage, args.num_queries, args.dec_layers) == (True, True, 20, 2)


def test_norms_of_the_decoder_are_numbered_otherwise_there(tmp_path):
    model = big_enough("multi-scale")
    official_format.save(model, tmp_path)
    names = torch.load(tmp_path / official_format.FILE, weights_only=False)["model"]
    layer = model.decoder.layers[0]
    assert torch.equal(names["transformer.decoder.layers.0.norm2.weight"], layer.norm1.weight)
    assert torch.equal(names["transformer.decoder.layers.0.norm1.weight"], layer.norm2.weight)


def test_transformers_takes_model_processor_and_names(tmp_path):
    model = ours(image_size=64, max_size=120)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", "transformers", tmp_path / "theirs")
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "theirs").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "theirs")
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "cow"}
    assert theirs.config.label2id == {"cat": 0, "dog": 1, "cow": 2}
    picture = Image.effect_noise((200, 100), 90).convert("RGB")
    inputs = processor(images=picture, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 60, 120)
    with torch.no_grad():
        here, there = model(inputs["pixel_values"]), theirs(**inputs)
    assert torch.allclose(here["pred_logits"], there.logits, atol=1e-5)
    found = processor.post_process_object_detection(there, threshold=0.0, target_sizes=[(100, 200)])[0]
    chosen = postprocess(
        {"pred_logits": there.logits, "pred_boxes": there.pred_boxes}, [(100, 200)], top_k=len(found["scores"])
    )
    assert torch.equal(chosen[0].scores, found["scores"])
    assert torch.equal(chosen[0].labels, found["labels"])
    assert torch.equal(chosen[0].boxes, found["boxes"])


def test_the_same_detections_from_the_same_file(tmp_path):
    """From the picture on: their processor, model and post-processing, and ours, which cuts boxes at the border.

    Where the long side's limit counts, transformers 5 stretches an image by up to a pixel of its short side; the
    paper's code does not, and neither do we.
    """
    model = ours(image_size=96, max_size=200)
    convert_model(model, "transformers", tmp_path / "theirs")
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "theirs").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "theirs")
    for width, height in ((317, 211), (480, 640), (50, 50)):
        picture = Image.effect_noise((width // 8 + 1, height // 8 + 1), 90).convert("RGB").resize((width, height))
        picture.save(tmp_path / "picture.png")
        with torch.no_grad():
            there = theirs(**processor(images=picture, return_tensors="pt"))
        expected = processor.post_process_object_detection(there, threshold=0.0, target_sizes=[(height, width)])[0]
        found = model.predict(tmp_path / "picture.png", threshold=0.0)
        assert len(found) == len(expected["scores"])
        assert (found.scores - expected["scores"]).abs().max() <= 1e-4
        clear = (expected["scores"].diff().abs() > 1e-4).nonzero().flatten()  # ranks that rounding does not decide
        firm = [int(i) for i in clear if int(i) - 1 in clear]
        assert len(firm) > 10
        border = torch.tensor([width, height, width, height])
        assert torch.equal(found.labels[firm], expected["labels"][firm])
        assert (found.boxes - expected["boxes"].clamp(min=0).minimum(border))[firm].abs().max() <= 0.05


def test_a_model_that_was_trained_on_there_does_not_keep_our_stale_config(tmp_path):
    ours().save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", "transformers", tmp_path / "theirs")
    model = transformers.AutoModelForObjectDetection.from_pretrained(
        tmp_path / "theirs", id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path / "further")
    found = DeformableDETR.from_pretrained(tmp_path / "further").config
    assert (found.class_names, found.category_ids) == (("a", "b"), (0, 1))
    # Names that were mended by hand in their config are the names; our ids then belong to nobody.
    path = tmp_path / "theirs" / "config.json"
    path.write_text(path.read_text().replace('"cow"', '"bull"'))
    found = DeformableDETR.from_pretrained(tmp_path / "theirs").config
    assert (found.class_names, found.category_ids) == (("cat", "dog", "bull"), (0, 1, 2))


@pytest.mark.parametrize(
    ("changes", "to", "message"),
    [
        ({"pre_norm": True}, "transformers", "pre_norm"),
        ({"class_aware_proposals": True}, "transformers", "class_aware_proposals"),
        ({"iterative_query_pos": True}, "official", "iterative_query_pos"),
        ({"query_init": "encoder"}, "official", "query_init"),
        ({}, "official", "test_resnet"),
        ({"backbone": "resnet50"}, "official", "hidden_dim"),
        ({"backbone": "resnet50", "activation": "gelu"}, "official", "activation"),
        ({"backbone": "resnet50", "num_feature_levels": 2}, "official", "num_feature_levels"),
        ({"hidden_dim": 48}, "transformers", "hidden_dim"),
    ],
)
def test_parts_that_the_others_lack(changes, to, message, tmp_path):
    ours(**changes).save_pretrained(tmp_path / "ours")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "ours", to, tmp_path / "theirs")
    assert not list((tmp_path / "theirs").glob("*"))


@pytest.mark.parametrize("broken", ["backbone", "heads", "unused", "unloadable"])
def test_a_conversion_that_computes_something_else_is_refused(broken, tmp_path, monkeypatch):
    """Faults put into the writer: a setting that means another network there, a tensor in another's place, …"""
    model = ours()
    model.save_pretrained(tmp_path / "ours")
    write, spread = transformers_format.write_config, transformers_format.spread

    def config_of_another(model):
        described = write(model)
        if broken == "backbone":  # the published trap: norms that lose the activations they carry, or another eps
            described["activation_function"] = "gelu"
        return described

    def misplaced(*arguments, **options):
        tensors = spread(*arguments, **options)
        if broken == "heads":
            tensors["model.decoder.class_embed.0.bias"] = tensors["model.decoder.class_embed.0.bias"] + 1e-3
        return tensors

    monkeypatch.setattr(transformers_format, "write_config", config_of_another)
    monkeypatch.setattr(transformers_format, "spread", misplaced)
    message = {"backbone": "the logits of this model differ by", "heads": "reads back with another"}.get(broken)
    if broken == "unused":
        report = {"missing_keys": {"class_embed.9.bias"}, "unexpected_keys": set()}
        load = transformers.AutoModelForObjectDetection.from_pretrained
        monkeypatch.setattr(
            transformers.AutoModelForObjectDetection,
            "from_pretrained",
            lambda folder, **options: (load(folder), report),
        )
        message = r"no use or no value for class_embed\.9\.bias"
    if broken == "unloadable":

        def fail(*arguments, **options):
            raise RuntimeError("size mismatch\nand a long story")

        monkeypatch.setattr(transformers.AutoModelForObjectDetection, "from_pretrained", fail)
        message = "cannot run this model: size mismatch$"
    with pytest.raises(UserError, match=f"^refused: .*{message}"):
        convert(tmp_path / "ours", "transformers", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_without_transformers_the_file_is_read_back(tmp_path, monkeypatch):
    ours().save_pretrained(tmp_path / "ours")
    monkeypatch.setitem(sys.modules, "transformers", None)
    lines = convert(tmp_path / "ours", "transformers", tmp_path / "theirs")
    assert "not installed" in lines[1]
    assert same(DeformableDETR.from_pretrained(tmp_path / "ours"), DeformableDETR.from_pretrained(tmp_path / "theirs"))


def test_whoever_trains_a_network_that_cannot_go_there_is_told(tmp_path):
    for name, preset in presets.PRESETS.items():
        line = not_convertible(preset())
        assert (line is None) == (name != "small")
    said = not_convertible(presets.small())
    assert said is not None
    assert "\n" not in said
    assert "--preset small-portable" in said


def test_conversion_writes_over_nothing(tmp_path):
    model = ours()
    model.save_pretrained(tmp_path / "ours")
    before = (tmp_path / "ours" / "config.json").read_text()
    with pytest.raises(UserError, match=r"already holds config\.json"):
        convert(tmp_path / "ours", "transformers", tmp_path / "ours")
    assert (tmp_path / "ours" / "config.json").read_text() == before
    with pytest.raises(UserError, match="is a file"):
        convert(tmp_path / "ours", "ours", tmp_path / "ours" / "config.json")
    with pytest.raises(UserError, match="choose from ours, transformers, official"):
        convert(tmp_path / "ours", "onnx", tmp_path / "out")
    with pytest.raises(UserError, match="cannot be written"):
        convert(tmp_path / "ours", "ours", tmp_path / "ours" / "config.json" / "deeper")


def test_others_may_read_what_is_written(tmp_path):
    ours().save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", "transformers", tmp_path / "theirs")
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


# --- the official code itself, where there is a checkout of it ----------------------------------------------------


@pytest.fixture(scope="module")
def official_code():
    """Functions of a checkout of the paper authors' repository, its compiled op replaced by its own Python version."""
    folder = os.environ.get("DEFORMABLE_DETR_OFFICIAL")
    if not folder or not Path(folder, "models", "deformable_detr.py").is_file():
        pytest.skip("no checkout of the official code (set DEFORMABLE_DETR_OFFICIAL)")
    import types

    import torchvision

    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(folder)
    patch.setitem(sys.modules, "MultiScaleDeformableAttention", types.ModuleType("MultiScaleDeformableAttention"))
    patch.setattr(torchvision, "__version__", "0.9.0")  # it compares the first three characters
    resnet = torchvision.models.resnet50
    patch.setattr(torchvision.models, "resnet50", lambda pretrained, **options: resnet(weights=None, **options))
    from models import (  # type: ignore[import-not-found]
        backbone,
        deformable_detr,
        deformable_transformer,
        position_encoding,
    )
    from models.ops.functions import ms_deform_attn_func  # type: ignore[import-not-found]
    from models.ops.modules import ms_deform_attn  # type: ignore[import-not-found]
    from util.misc import NestedTensor  # type: ignore[import-not-found]

    def op(value, shapes, starts, locations, weights, step):
        return ms_deform_attn_func.ms_deform_attn_core_pytorch(value, shapes, locations, weights)

    patch.setattr(ms_deform_attn, "MSDeformAttnFunction", types.SimpleNamespace(apply=op))

    def build(args, classes):
        return deformable_detr.DeformableDETR(
            backbone.build_backbone(args), deformable_transformer.build_deforamble_transformer(args),
            num_classes=classes, num_queries=args.num_queries, num_feature_levels=args.num_feature_levels,
            aux_loss=True, with_box_refine=args.with_box_refine, two_stage=args.two_stage,
        )  # fmt: skip

    @contextmanager
    def precision(dtype):
        """Its positions and valid ratios are float32 by name, as is our encoding of proposals (and transformers'): in
        float64 these names mean that.
        """
        with pytest.MonkeyPatch.context() as doubled:
            if dtype == torch.float64:
                named = types.SimpleNamespace(**{**vars(torch), "float32": torch.float64})
                doubled.setattr(position_encoding, "torch", named)
                doubled.setattr(deformable_transformer, "torch", named)
                doubled.setattr(torch.Tensor, "float", torch.Tensor.double)
            yield

    yield types.SimpleNamespace(
        build=build, Nested=NestedTensor, PostProcess=deformable_detr.PostProcess, precision=precision
    )
    patch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_the_official_code_gives_the_same(official_code, name, tmp_path):
    """At full size, in both directions; what their modules themselves save, and what we write for them."""
    torch.manual_seed(0)
    model = randomized(DeformableDETR(presets.PRESETS[name](backbone_weights="none")))
    official_format.save(model, tmp_path)
    values = torch.load(tmp_path / official_format.FILE, weights_only=False)
    theirs = official_code.build(values["args"], 91)
    torch.save({"model": randomized(theirs, seed=2).state_dict(), "args": values["args"]}, tmp_path / "theirs.pth")
    for path in (tmp_path / "theirs.pth", tmp_path / official_format.FILE):
        theirs.float().load_state_dict(torch.load(path, weights_only=False)["model"], strict=True)
        here = DeformableDETR.from_pretrained(path)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
            pixels, mask = batch(dtype)
            with torch.no_grad(), official_code.precision(dtype):
                found = here.to(dtype)(pixels, mask)
                expected = theirs.to(dtype).eval()(official_code.Nested(pixels, mask))
            pairs = {"logits": ("pred_logits", found["pred_logits"]), "boxes": ("pred_boxes", found["pred_boxes"])}
            for what, (key, value) in pairs.items():
                assert (expected[key] - value).abs().max() <= tolerance, what
            for layer, outputs in enumerate(expected["aux_outputs"]):
                assert (outputs["pred_logits"] - found["layer_logits"][layer]).abs().max() <= tolerance
                assert (outputs["pred_boxes"] - found["layer_boxes"][layer]).abs().max() <= tolerance
            if name == "two-stage":
                proposed = expected["enc_outputs"]
                assert (proposed["pred_logits"] - found["encoder_logits"]).abs().max() <= tolerance
            assert expected["pred_logits"].std() > 0.1
            sizes = torch.tensor([[480, 640], [300, 500], [333, 444]])
            for there, chosen in zip(
                official_code.PostProcess()(expected, sizes), postprocess(expected, sizes.tolist()), strict=True
            ):
                assert torch.equal(there["scores"], chosen.scores)
                assert torch.equal(there["labels"], chosen.labels)
                assert torch.equal(there["boxes"], chosen.boxes)
