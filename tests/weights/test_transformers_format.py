"""Transformers repositories: keys, configs, image processors, and settings without an equivalent."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from deformable_detr import DeformableDETR, UserError
from deformable_detr.config.image_size import FixedSize
from deformable_detr.weights import transformers_format
from deformable_detr.weights.load import read_checkpoint
from tests.support.parity import TINY, compare, transformers
from tests.support.weights import (
    edit_json,
    equal_weights,
    load_error,
    read_tensors,
    tiny_transformers_model,
    write_tensors,
)


def test_checkpoint_of_a_repository(shared_repo):
    checkpoint = read_checkpoint(shared_repo)
    model, state = checkpoint.build(DeformableDETR)
    assert type(model) is DeformableDETR
    assert state.keys() == model.state_dict().keys()
    assert checkpoint.config == model.config
    assert checkpoint.config.num_classes == TINY["num_labels"]


def test_missing_config_keys_have_transformers_defaults(tmp_path):
    transformers.DeformableDetrConfig().save_pretrained(tmp_path)
    defaults = json.loads((tmp_path / "config.json").read_text())
    expected = transformers_format.read_config({**defaults, "backbone_config": None}, {}, tmp_path)
    assert transformers_format.read_config({"model_type": "deformable_detr"}, {}, tmp_path) == expected
    assert expected.num_classes == 2


@pytest.mark.parametrize("variant", ["plain", "two-stage"])
def test_keys_of_older_releases(variant, tmp_path):
    model = tiny_transformers_model(variant)
    model.save_pretrained(tmp_path)
    expected = DeformableDETR.from_pretrained(tmp_path)
    write_tensors(tmp_path, model.state_dict())
    assert equal_weights(expected, DeformableDETR.from_pretrained(tmp_path))
    edit_json(tmp_path / "config.json", backbone="test_resnet", use_timm_backbone=True, backbone_config=None)
    assert equal_weights(expected, DeformableDETR.from_pretrained(tmp_path))


def test_class_heads_per_layer_without_two_stage(tmp_path):
    """Transformers 5 ties the heads of new models, but published repositories have one per layer."""
    model = tiny_transformers_model("refine")
    model.save_pretrained(tmp_path)
    tensors = read_tensors(tmp_path)
    for layer in (1, 2):
        for part in ("weight", "bias"):
            tensors[f"class_embed.{layer}.{part}"] = tensors[f"class_embed.0.{part}"] + layer
    write_tensors(tmp_path, tensors)
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path)
    ours = DeformableDETR.from_pretrained(tmp_path)
    assert not torch.equal(ours.decoder.heads.classes[0].bias, ours.decoder.heads.classes[2].bias)
    compare(theirs.eval(), ours, torch.float64)
    del tensors["class_embed.1.bias"]  # a gap means that the heads are not tied
    write_tensors(tmp_path, tensors)
    assert "lacks class_embed.1.bias" in load_error(tmp_path)


def test_config_and_names(tmp_path):
    names = ["person", "N/A", "traffic light", "N/A", "été"]
    tiny_transformers_model(id2label=dict(enumerate(names)), label2id={}, activation_function="swish").save_pretrained(
        tmp_path
    )
    size = {"shortest_edge": 480, "longest_edge": 640}
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": size, **statistics}))
    model = DeformableDETR.from_pretrained(tmp_path)
    config = model.config
    assert config.class_names == tuple(names)
    assert config.category_ids == (0, 1, 2, 3, 4)
    assert (config.image_size, config.long_side) == (480, 640)
    assert (config.activation, config.num_queries, config.decoder_layers) == ("silu", 20, 3)
    assert model.pixel_mean.tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert model.pixel_std.tolist() == pytest.approx([0.2, 0.25, 0.3])


@pytest.mark.parametrize(
    ("id2label", "names"),
    [
        ({"2": "c", "0": "a", "3": None, "4": 2.5}, ("a", "LABEL_1", "c", "LABEL_3", "2.5")),
        (dict.fromkeys("01234", "a"), ("a",) * 5),
        (None, tuple(f"LABEL_{label}" for label in range(5))),
    ],
)
def test_class_names(repo, id2label, names):
    edit_json(repo / "config.json", id2label=id2label, num_labels=5)
    config = DeformableDETR.from_pretrained(repo).config
    assert (config.class_names, config.category_ids) == (names, (0, 1, 2, 3, 4))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (800, 1333, 0.485, 0.229)),
        ({"size": 600, "max_size": 900}, (600, 900, 0.485, 0.229)),
        ({"size": 480}, (480, 1333, 0.485, 0.229)),
        ({"size": {"shortest_edge": 480, "longest_edge": None}}, (480, 800, 0.485, 0.229)),
        ({"size": {"height": 640, "width": 480}}, (640, 640, 0.485, 0.229)),
        ({"do_normalize": False}, (800, 1333, 0.0, 1.0)),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}, (800, 1333, 0.5, 0.2)),
        ({"rescale_factor": 1.0, "do_normalize": False}, (800, 1333, 0.0, 1 / 255)),
    ],
)
def test_image_processor(shared_repo, tmp_path, values, expected):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    fields = transformers_format.read_processor(tmp_path)
    config_values = json.loads((shared_repo / "config.json").read_text())
    config = transformers_format.read_config(config_values, fields, tmp_path)
    assert config.pixel_mean is not None
    assert config.pixel_std is not None
    assert (config.image_size, config.long_side) == expected[:2]
    if "height" in str(values.get("size")):
        assert config.resize_rule == FixedSize(640, 480)
    assert (config.pixel_mean[0], config.pixel_std[0]) == pytest.approx(expected[2:])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("[]", "does not hold a JSON object"),
        ('{"image_mean": "gray"}', "image_mean or image_std is not a number"),
        ('{"image_mean": [0.5], "image_std": [0.5]}', "3 numbers"),
        ('{"size": {"shortest_edge": 1000000000}}', "pixels"),
        ('{"size": {"height": Infinity}}', "not a number"),
        ('{"size": {"shortest_edge": 0}}', "pixels"),
    ],
)
def test_invalid_image_processor_is_reported(tmp_path, values, message):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(values)
    with pytest.raises(UserError, match=message) as caught:
        transformers_format.read_processor(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_low_precision_weights(dtype, shared_repo, repo):
    tensors = read_tensors(repo)
    write_tensors(repo, {key: v.to(dtype) if v.is_floating_point() else v for key, v in tensors.items()})
    state = DeformableDETR.from_pretrained(repo).state_dict()
    for name, value in DeformableDETR.from_pretrained(shared_repo).state_dict().items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value.to(dtype).to(value.dtype) if value.is_floating_point() else value)


def test_double_precision_weights(repo):
    model = tiny_transformers_model().double()
    model.save_pretrained(repo)
    ours = DeformableDETR.from_pretrained(repo)
    assert ours.level_embedding.dtype == torch.float64
    compare(model, ours, torch.float64)


@pytest.mark.parametrize("saved", ["[" * 99999, '{"num_classes": 2, "category_ids": [1, 2], "backbone": "x"}'])
def test_mismatched_embedded_config_is_ignored(saved, shared_repo, repo):
    write_tensors(repo, read_tensors(repo), **{"deformable-detr": saved})
    expected, model = DeformableDETR.from_pretrained(shared_repo), DeformableDETR.from_pretrained(repo)
    assert model.config == expected.config
    assert equal_weights(expected, model)


def test_unusual_valid_configs_load(shared_repo, repo):
    """Symbolic links as in the hub cache, a byte order mark, unknown keys, no optional keys, no image processor."""
    path = repo / "config.json"
    values = json.loads(path.read_text())
    values = {key: value for key, value in values.items() if key not in ("architectures", "dtype", "label2id")}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({**values, "color": "red", "auxiliary_loss": True}).encode())
    for file in list(repo.iterdir()):
        file.rename(repo.parent / f"blob-{file.name}")
        file.symlink_to(repo.parent / f"blob-{file.name}")
    assert equal_weights(DeformableDETR.from_pretrained(shared_repo), DeformableDETR.from_pretrained(repo))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "not hold a JSON object"),
        (b"{}", "model_type None"),
        (b"[" * 99999, "not valid JSON"),
        ("{}".encode("utf-16"), "not valid JSON"),
        (b'{"num_queries": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_malformed_config_is_reported(repo, content, message):
    (repo / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        DeformableDETR.from_pretrained(repo)
    assert str(repo / "config.json") in str(caught.value)


def test_huge_config_is_rejected(repo):
    os.truncate(repo / "config.json", 2**33)
    assert "8192 MiB" in load_error(repo)


TIMM = {"model_type": "timm_backbone", "backbone": "test_resnet", "out_indices": [2, 3, 4]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "detr"}, "'detr'"),
        ({"d_model": 48}, "lacks|shape"),
        ({"d_model": "wide"}, "hidden_dim"),
        ({"d_model": 32 * 10**3}, "no tensor is as large as hidden_dim"),
        ({"d_model": 32 * 10**9}, "hidden_dim: input should be less than or equal to 100000"),
        ({"encoder_layers": 900}, "no tensor is as large as encoder_layers"),
        ({"encoder_layers": 10**6}, "encoder_layers: input should be less than or equal to 1000"),
        ({"encoder_layers": -1}, "encoder_layers"),
        ({"encoder_layers": 0, "two_stage": False}, "does not call for|lacks"),
        ({"decoder_layers": 4}, "lacks"),
        ({"num_queries": "many", "two_stage": False}, "num_queries"),
        ({"dropout": float("nan")}, "dropout"),
        ({"activation_function": []}, "activation"),
        ({"activation_function": "tanh"}, "activation"),
        ({"decoder_attention_heads": 2}, "must be equal"),
        ({"num_feature_levels": 3}, "level_embed"),
        ({"position_embedding_type": "none"}, "position_encoding"),
        ({"id2label": []}, "id2label must map"),
        ({"id2label": {}}, "id2label must map"),
        ({"id2label": {"0": "a"}}, "has shape"),
        ({"id2label": dict.fromkeys("012345", "a")}, "has shape"),
        ({"id2label": {"1000000000000": "a"}}, "labels outside"),
        ({"id2label": {"cat": "0"}}, "id2label must map"),
        ({"id2label": {"-1": "a", "0": "b"}}, "labels outside"),
        ({"id2label": None, "num_labels": 10**12}, "num_labels"),
        ({"with_box_refine": False}, "two_stage.*refine"),
        ({"backbone_config": {"model_type": "swin"}}, "'swin'"),
        ({"backbone_config": {"model_type": "timm_backbone", "backbone": "../evil"}}, "is not a timm model"),
        ({"backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:a/b"}}, "is not a timm model"),
        ({"backbone_config": {**TIMM, "backbone": "resnet50.evil"}}, r"resnet50\.evil"),
        ({"backbone_config": {"model_type": "timm_backbone"}}, "backbone"),
        ({"backbone_config": {**TIMM, "backbone": "resnet18"}}, "lacks|shape"),
        ({"backbone_config": {**TIMM, "output_stride": 8}}, "output_stride"),
        ({"backbone_config": {**TIMM, "backbone": "tf_efficientnet_lite0"}}, "freeze_batch_norm_2d"),
        ({"backbone_config": {"model_type": "resnet", "downsample_in_first_stage": True}}, "first_stage"),
        ({"backbone_config": {"model_type": "resnet", "depths": "many"}}, "depths"),
        ({"backbone_config": 7}, "backbone_config"),
    ],
)
def test_unsupported_configs_are_rejected(repo, changes, message):
    edit_json(repo / "config.json", **changes)
    with pytest.raises(UserError, match=message) as caught:
        DeformableDETR.from_pretrained(repo)
    assert "\n" not in str(caught.value)
    assert str(repo) in str(caught.value) or "backbone" in str(caught.value)


def test_mismatched_tensors_are_reported(repo):
    tensors = read_tensors(repo)
    name, attention = "model.encoder.layers.0.fc1.weight", "model.decoder.layers.0.self_attn"
    cases = {
        f"lacks {name}": {n: v for n, v in tensors.items() if n != name},
        f"lacks {attention}.k_proj.bias": {n: v for n, v in tensors.items() if n != f"{attention}.k_proj.bias"},
        "model.extra": {**tensors, "model.extra": torch.zeros(1)},
        f"{name} has shape": {**tensors, name: tensors[name][:-1].clone()},
        "q_proj.weight has shape": {**tensors, f"{attention}.q_proj.weight": torch.zeros(3, 64)},
        f"{name} has dtype int8": {**tensors, name: tensors[name].to(torch.int8)},
        f"{name} has dtype complex64": {**tensors, name: tensors[name].to(torch.complex64)},
        "should be the same tensor": {**tensors, "class_embed.0.bias": tensors["model.decoder.class_embed.0.bias"] + 1},
        "no tensor is as large as": {"bert.encoder.weight": torch.zeros(3)},
    }
    for message, changed in cases.items():
        save_file(changed, repo / "model.safetensors", metadata={"format": "pt"})
        error = load_error(repo)
        assert message in error
        assert str(repo / "model.safetensors") in error
