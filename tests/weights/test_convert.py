"""Conversion between formats: a round trip keeps all weights, or the model is rejected."""

import sys

import pytest
import torch
from PIL import Image

from deformable_detr import DeformableDETR, UserError
from deformable_detr.config import presets
from deformable_detr.model.postprocess import postprocess
from deformable_detr.weights import official_format, transformers_format
from deformable_detr.weights.convert import convert, portability_note, write
from tests.support.parity import transformers
from tests.support.weights import equal_weights, tiny_model

PRESETS = [name for name in presets.PRESETS if not name.startswith(("small", "dino"))]
SIZES = {"image_size": 320, "size_divisor": 32}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {"backbone_norm": "frozen"}) for name in PRESETS),
        ("two-stage", {"backbone_norm": "train"}),
        ("small-portable", {"backbone": "tf_efficientnet_lite0", "hidden_dim": 128}),
    ],
)
def test_transformers_round_trip(name, changes, tmp_path):
    model = tiny_model(presets.PRESETS[name], dropout=0.0, **{**SIZES, **changes})
    model.save_pretrained(tmp_path / "native")
    lines = convert(tmp_path / "native", "transformers", tmp_path / "theirs")
    assert lines[1] == "verified: transformers computes the same logits and boxes"
    assert "note: resize images to multiples of 32" in lines[2]
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip
    convert(tmp_path / "theirs", "native", tmp_path / "back")
    reloaded = DeformableDETR.from_pretrained(tmp_path / "back")
    assert equal_weights(model, reloaded)
    original_config, reloaded_config = (
        model.config.without_pretrained_backbone().model_dump(),
        reloaded.config.model_dump(),
    )
    # Transformers names backbones differently and always states the pixel statistics.
    different = {key for key in original_config if original_config[key] != reloaded_config[key]}
    assert different <= {"backbone", "backbone_shape", "pixel_mean", "pixel_std"}
    assert torch.equal(reloaded.pixel_mean, model.pixel_mean)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in PRESETS if name != "two-stage"),
        ("two-stage", {"hidden_dim": 256, "backbone_norm": "train"}),
        ("refine", {"backbone": "resnet50", "backbone_norm": "frozen"}),
    ],
)
def test_official_format_round_trip(name, changes, tmp_path, tiny_backbone):
    model = tiny_model(presets.PRESETS[name], num_heads=8, **SIZES, **changes)
    model.save_pretrained(tmp_path / "native")
    lines = convert(tmp_path / "native", "official", tmp_path / "theirs")
    assert any("num_classes = 3" in line for line in lines)
    assert any("multiples of 32" in line for line in lines)
    convert(tmp_path / "theirs" / official_format.FILE, "native", tmp_path / "back")
    reloaded = DeformableDETR.from_pretrained(tmp_path / "back")
    assert equal_weights(model, reloaded)
    assert reloaded.config == model.config.without_pretrained_backbone()


def test_transformers_loads_model_processor_and_names(tmp_path):
    model = tiny_model(image_size=64, max_size=120)
    write(model, "transformers", tmp_path)
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "cow"}
    assert theirs.config.label2id == {"cat": 0, "dog": 1, "cow": 2}
    image = Image.effect_noise((200, 100), 90).convert("RGB")
    inputs = processor(images=image, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 60, 120)
    with torch.no_grad():
        ours, outputs = model(inputs["pixel_values"]), theirs(**inputs)
    assert torch.allclose(ours["pred_logits"], outputs.logits, atol=1e-5)
    expected = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(100, 200)])[0]
    raw = {"pred_logits": outputs.logits, "pred_boxes": outputs.pred_boxes}
    [selected] = postprocess(raw, [(100, 200)], top_k=len(expected["scores"]))
    assert torch.equal(selected.scores, expected["scores"])
    assert torch.equal(selected.labels, expected["labels"])
    assert torch.equal(selected.boxes, expected["boxes"])


def test_detections_match_transformers_from_the_image_file(tmp_path):
    """If the long side is limited, transformers 5 stretches the image by up to a pixel; the paper's code does not."""
    model = tiny_model(image_size=96, max_size=200)
    write(model, "transformers", tmp_path / "theirs")
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "theirs").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "theirs")
    for width, height in ((317, 211), (480, 640), (50, 50)):
        image = Image.effect_noise((width // 8 + 1, height // 8 + 1), 90).convert("RGB").resize((width, height))
        image.save(tmp_path / "image.png")
        with torch.no_grad():
            outputs = theirs(**processor(images=image, return_tensors="pt"))
        expected = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(height, width)])[0]
        detections = model.predict(tmp_path / "image.png", threshold=0.0)
        assert len(detections) == len(expected["scores"])
        assert (detections.scores - expected["scores"]).abs().max() <= 1e-4
        distinct = (expected["scores"].diff().abs() > 1e-4).nonzero().flatten()  # ranks that do not depend on rounding
        ranks = [int(i) for i in distinct if int(i) - 1 in distinct]
        assert len(ranks) > 10
        image_size = torch.tensor([width, height, width, height])
        assert torch.equal(detections.labels[ranks], expected["labels"][ranks])
        clipped = expected["boxes"].clamp(min=0).minimum(image_size)
        assert (detections.boxes - clipped)[ranks].abs().max() <= 0.05


def test_embedded_config_is_ignored_after_changes_in_transformers(native_model, tmp_path):
    write(native_model, "transformers", tmp_path / "theirs")
    model = transformers.AutoModelForObjectDetection.from_pretrained(
        tmp_path / "theirs", id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path / "changed")
    config = DeformableDETR.from_pretrained(tmp_path / "changed").config
    assert (config.class_names, config.category_ids) == (("a", "b"), (0, 1))
    path = tmp_path / "theirs" / "config.json"  # a class name edited by hand invalidates our category ids
    path.write_text(path.read_text().replace('"cow"', '"bull"'))
    config = DeformableDETR.from_pretrained(tmp_path / "theirs").config
    assert (config.class_names, config.category_ids) == (("cat", "dog", "bull"), (0, 1, 2))


@pytest.mark.parametrize(
    ("changes", "target_format", "message"),
    [
        ({"pre_norm": True}, "transformers", "pre_norm: True"),
        ({"class_aware_proposals": True}, "transformers", "class_aware_proposals: True"),
        ({"iterative_query_pos": True}, "official", "iterative_query_pos: True"),
        ({"query_init": "encoder"}, "official", "query_init: encoder"),
        ({"decoder_norm": True}, "transformers", "decoder_norm: True"),
        ({"box_eps": (1e-3, 1e-3)}, "official", "box_eps"),
        ({"position_encoding": "dino"}, "transformers", "position_encoding: dino"),
        ({"finest_stride": 4}, "official", "finest_stride: 4"),
        ({"masks": True}, "official", "masks: True; fine-tune as --preset"),
        ({"masks": True}, "transformers", "masks: True; fine-tune as --preset small-portable"),
        ({}, "official", "no backbone 'test_resnet'"),
        ({"backbone": "resnet50"}, "official", "hidden_dim of 256"),
        ({"activation": "gelu"}, "official", "activation: gelu"),
        ({"num_feature_levels": 2}, "official", "num_feature_levels: 2"),
    ],
)
def test_unsupported_networks_are_rejected(changes, target_format, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write(tiny_model(**changes), target_format, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("fault", ["activation", "tensor", "unused", "unloadable"])
def test_conversion_with_different_outputs_is_rejected(fault, native_model, tmp_path, monkeypatch):
    """Faults of the writer and of transformers."""
    write_config, to_reference_keys = transformers_format.write_config, transformers_format.to_reference_keys
    auto_class = transformers.AutoModelForObjectDetection
    if fault == "activation":
        message = "the logits differ from this model's"
        faulty = lambda model: {**write_config(model), "activation_function": "gelu"}  # noqa: E731
        monkeypatch.setattr(transformers_format, "write_config", faulty)
    elif fault == "tensor":
        message = "reads back with other values"

        def misplaced(*arguments, **options):
            tensors = to_reference_keys(*arguments, **options)
            tensors["model.decoder.class_embed.0.bias"] += 1e-3
            return tensors

        monkeypatch.setattr(transformers_format, "to_reference_keys", misplaced)
    elif fault == "unused":
        message = r"no use or no value for class_embed\.9\.bias"
        load, report = auto_class.from_pretrained, {"missing_keys": {"class_embed.9.bias"}, "unexpected_keys": set()}
        monkeypatch.setattr(auto_class, "from_pretrained", lambda folder, **options: (load(folder), report))
    else:
        message = "cannot run this model: size mismatch$"

        def fail(*arguments, **options):
            raise RuntimeError("size mismatch\nand a long story")

        monkeypatch.setattr(auto_class, "from_pretrained", fail)
    with pytest.raises(UserError, match=f"^refused: .*{message}"):
        write(native_model, "transformers", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_without_transformers_only_the_tensors_are_verified(native_model, native_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    lines = convert(native_folder, "transformers", tmp_path)
    assert "not installed" in lines[1]
    assert equal_weights(native_model, DeformableDETR.from_pretrained(tmp_path))


def test_portability_note_for_unsupported_networks():
    for name, preset in presets.PRESETS.items():
        note = portability_note(preset())
        assert (note is None) == (name not in ("small", "small-masks") and not name.startswith("dino"))
        assert note is None or "--preset small-portable" in note
        assert note is None or ("without masks" in note) == preset().masks


def test_existing_files_are_not_overwritten(native_folder, tmp_path):
    original_config = (native_folder / "config.json").read_text()
    with pytest.raises(UserError, match=r"already has config\.json"):
        convert(native_folder, "transformers", native_folder)
    assert (native_folder / "config.json").read_text() == original_config
    with pytest.raises(UserError, match="cannot be written: File exists"):
        convert(native_folder, "transformers", native_folder / "config.json")
    with pytest.raises(UserError, match="choose from native, transformers, official"):
        convert(native_folder, "onnx", tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot be written"):
        convert(native_folder, "native", native_folder / "config.json" / "deeper")


def test_files_have_default_permissions(native_model, tmp_path):
    write(native_model, "transformers", tmp_path)
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_convert_command(native_folder, tmp_path, capsys):
    from deformable_detr import cli

    command = ["convert", str(native_folder), "--to", "transformers", "--out", str(tmp_path / "out")]
    cli.main(command)
    assert "AutoModelForObjectDetection" in capsys.readouterr().out
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    with pytest.raises(SystemExit) as raised:
        cli.main(command)
    assert raised.value.code == 2
    assert capsys.readouterr().err.startswith("error: --out")
