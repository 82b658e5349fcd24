"""Sources that are broken, foreign or malicious: one clear error, and nothing of them is run."""

import argparse
import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from deformable_detr import DeformableDETR, UserError
from tests.weights.test_load import checkpoint, edit, repo

__all__ = ["repo"]  # the fixture


class Evil:
    """Pickles as a call of os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("where", ["official", "args", "repository", "shard"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_runs_nothing(where, zipped, repo, tmp_path):
    touched = tmp_path / "touched"
    evil = Evil(f"touch {touched}")
    if where in ("official", "args"):
        values, path = checkpoint(tmp_path / "official")
        values = {**values, "args": evil} if where == "args" else evil
    else:
        values, path = {"model.level_embed": evil}, repo / "pytorch_model.bin"
        (repo / "model.safetensors").unlink()
        if where == "shard":
            path = repo / "part.bin"
            listed = {"weight_map": {"model.level_embed": "part.bin"}}
            (repo / "pytorch_model.bin.index.json").write_text(json.dumps(listed))
    torch.save(values, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"refused.*system") as caught:
        DeformableDETR.from_pretrained(repo if where in ("repository", "shard") else path)
    assert "\n" not in str(caught.value)
    assert not touched.exists()
    torch.load(path, weights_only=False)  # the control: the file would have done it
    assert touched.exists()


def test_only_official_checkpoints_may_hold_settings(repo):
    (repo / "model.safetensors").unlink()
    torch.save({"args": argparse.Namespace(a=1)}, repo / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"refused.*argparse\.Namespace"):
        DeformableDETR.from_pretrained(repo)


def test_truncated_and_foreign_files(repo, tmp_path):
    values, path = checkpoint(tmp_path / "official")
    torch.save(values, path)
    torch.save(values, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    tensors = load_file(repo / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    shutil.copy(repo / "config.json", tmp_path)
    whole = {file: file.read_bytes() for file in (path, tmp_path / "old.pth", repo / "model.safetensors",
                                                  tmp_path / "pytorch_model.bin")}  # fmt: skip
    for file, content in whole.items():
        for damaged in (
            b"", content[:1], content[:7], content[:100], content[: len(content) // 2], content[:-1], content[:-40],
            b"\x00" * 1000, b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\n",
            pickle.dumps({"model": 3}), pickle.dumps([1]),
            content[:40] + bytes(255 - byte for byte in content[40:400]) + content[400:],
        ):  # fmt: skip
            file.write_bytes(damaged)
            target = file.parent if file.suffix in (".safetensors", ".bin") else file
            with pytest.raises(UserError) as caught:
                DeformableDETR.from_pretrained(target)
            assert "\n" not in str(caught.value)
            assert str(file.parent) in str(caught.value)
        file.write_bytes(content)
        DeformableDETR.from_pretrained(file.parent if file.suffix in (".safetensors", ".bin") else file)


def test_tampered_tensors(repo):
    tensors = load_file(repo / "model.safetensors")
    name = "model.encoder.layers.0.fc1.weight"
    cases = {
        f"lacks {name}": {n: v for n, v in tensors.items() if n != name},
        "lacks model.decoder.layers.0.self_attn.k_proj.bias": {
            n: v for n, v in tensors.items() if n != "model.decoder.layers.0.self_attn.k_proj.bias"
        },
        "unknown tensor model.extra": {**tensors, "model.extra": torch.zeros(1)},
        f"{name} has shape": {**tensors, name: tensors[name][:-1].clone()},
        "q_proj.weight has shape": {**tensors, "model.decoder.layers.0.self_attn.q_proj.weight": torch.zeros(3, 64)},
        f"{name} holds int8 numbers": {**tensors, name: tensors[name].to(torch.int8)},
        "should be the same tensor": {**tensors, "class_embed.0.bias": tensors["model.decoder.class_embed.0.bias"] + 1},
    }
    for message, changed in cases.items():
        save_file(changed, repo / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=message):
            DeformableDETR.from_pretrained(repo)


TIMM = {"model_type": "timm_backbone", "out_indices": [2, 3, 4]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "detr"}, "'detr'"),
        ({"model_type": None}, "None"),
        ({"d_model": 48}, "multiple of 32"),
        ({"d_model": "wide"}, "d_model"),
        ({"d_model": 32 * 10**9}, "more than anything in the weights"),
        ({"encoder_layers": 10**6}, "more than anything in the weights"),
        ({"activation_function": []}, "activation"),
        ({"decoder_attention_heads": 2}, "must be the same"),
        ({"num_feature_levels": 3}, "level_embed"),
        ({"encoder_layers": -1}, "encoder_layers"),
        ({"activation_function": "tanh"}, "activation"),
        ({"position_embedding_type": "none"}, "position_encoding"),
        ({"num_channels": 1}, "num_channels"),
        ({"id2label": []}, "id2label"),
        ({"id2label": {"0": "a"}}, "has shape"),
        ({"with_box_refine": False}, "two_stage needs refine"),
        ({"backbone_config": {"model_type": "swin"}}, "'swin'"),
        ({"backbone_config": {"model_type": "timm_backbone", "backbone": "no_such_net"}}, "no_such_net"),
        ({"backbone_config": {"model_type": "timm_backbone"}}, "backbone"),
        ({"backbone_config": {**TIMM, "backbone": "resnet18"}}, "lacks|shape"),
        ({"backbone_config": {"model_type": "timm_backbone", "backbone": "test_resnet", "out_indices": [1, 2, 3]}},
         "feature maps"),
        ({"backbone_config": {"model_type": "timm_backbone", "backbone": "test_resnet"}}, "feature maps"),
        ({"backbone_config": {"model_type": "timm_backbone", "backbone": "test_resnet", "out_indices": "all"}},
         "feature maps"),
        ({"backbone_config": {"model_type": "timm_backbone", "backbone": "test_resnet", "output_stride": 8}},
         "output_stride"),
        ({"backbone_config": {"model_type": "resnet", "downsample_in_first_stage": True}}, "first_stage"),
        ({"backbone_config": {"model_type": "resnet", "depths": "many"}}, "depths"),
        ({"backbone_config": {**TIMM, "backbone": "tf_efficientnet_lite0"}}, "batch norms"),
        ({"backbone_config": 7}, "backbone_config"),
    ],
)  # fmt: skip
def test_configs_that_have_no_equal_here(repo, changes, message):
    edit(repo / "config.json", **changes)
    with pytest.raises(UserError, match=message) as caught:
        DeformableDETR.from_pretrained(repo)
    assert "\n" not in str(caught.value)


def test_broken_repositories(repo, tmp_path):
    config_file = repo / "config.json"
    whole = config_file.read_text()
    for text, message in (
        (whole[:50], "JSON"),
        ("[1]", "JSON object"),
        ("{}", "None"),
        ("", "JSON"),
        ("[" * 99999, "JSON"),
    ):
        config_file.write_text(text)
        with pytest.raises(UserError, match=message):
            DeformableDETR.from_pretrained(repo)
    config_file.write_text(whole)
    (repo / "preprocessor_config.json").write_text('{"image_mean": "gray"}')
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        DeformableDETR.from_pretrained(repo)
    (repo / "preprocessor_config.json").unlink()
    (repo / "model.safetensors").rename(tmp_path / "outside.safetensors")
    with pytest.raises(UserError, match="has no weights"):
        DeformableDETR.from_pretrained(repo)
    index = repo / "model.safetensors.index.json"
    for content, message in (
        ({}, "weight_map"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors"),
        ({"weight_map": {"a": "../outside.safetensors"}}, "not a file beside it"),
        ({"weight_map": {"a": str(tmp_path / "outside.safetensors")}}, "not a file beside it"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            DeformableDETR.from_pretrained(repo)
    shutil.copy(tmp_path / "outside.safetensors", repo / "one.safetensors")
    index.write_text(json.dumps({"weight_map": {"not.there": "one.safetensors"}}))
    with pytest.raises(UserError, match=r"not\.there"):
        DeformableDETR.from_pretrained(repo)


def test_other_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "image.pth").write_bytes(b"\x89PNG")
    (tmp_path / "cards.onnx").write_bytes(b"\x08")
    torch.save({"model": {"backbone.weight": torch.zeros(1)}}, tmp_path / "detr.pth")
    torch.save({"model": {"a": [1, 2]}}, tmp_path / "odd.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "alone.safetensors")
    for name, message in (
        ("empty", "config.json"), ("image.pth", "broken"), ("detr.pth", "level_embed"), ("odd.pth", "no tensor"),
        ("list.pth", "dict"), ("alone.safetensors", "config.json beside"), ("gone", "no such"), 
        ("cards.onnx", "an exported file is no model"), ("gone.pth", "no such"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            DeformableDETR.from_pretrained(tmp_path / name)
