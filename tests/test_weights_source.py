"""from_pretrained: every kind of source, its config and class names, and what is refused."""

import argparse
import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from deformable_detr import DeformableDETR, UserError, presets
from deformable_detr.weights import official, repository, source
from test_model_parity import TINY, batch, compare, config, randomised, transformers

OURS = {
    "backbone": "test_resnet", "backbone_weights": "none", "hidden_dim": 64, "num_heads": 4, "ffn_dim": 48,
    "encoder_layers": 1, "decoder_layers": 2, "num_queries": 20, "num_classes": 3,
    "class_names": ("cat", "dog", "cow"), "category_ids": (3, 1, 90),
}  # fmt: skip


def ours(variant=presets.two_stage, **changes) -> DeformableDETR:
    torch.manual_seed(0)
    return randomised(DeformableDETR(variant(**{**OURS, **changes})))


def theirs(variant="two-stage", **changes):
    return randomised(transformers.DeformableDetrForObjectDetection(config(variant, 4, **changes)))


@pytest.fixture
def repo(tmp_path):
    """A two-stage transformers repository."""
    theirs().save_pretrained(tmp_path / "repo")
    return tmp_path / "repo"


def same(a: DeformableDETR, b: DeformableDETR) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- transformers repositories in all their forms -----------------------------------------------------------------


def test_sharded_safetensors(repo, tmp_path):
    whole = DeformableDETR.from_pretrained(repo)
    theirs().save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert same(whole, DeformableDETR.from_pretrained(tmp_path / "shards"))


def test_older_pickled_weights_whole_and_sharded(repo):
    whole = DeformableDETR.from_pretrained(repo)
    tensors = load_file(repo / "model.safetensors")
    (repo / "model.safetensors").unlink()
    torch.save(tensors, repo / "pytorch_model.bin")
    assert same(whole, DeformableDETR.from_pretrained(repo))
    (repo / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in parts.items():
        torch.save({name: tensors[name] for name in part}, repo / file)
    listed = {name: file for file, part in parts.items() for name in part}
    (repo / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": listed}))
    assert same(whole, DeformableDETR.from_pretrained(repo))


@pytest.mark.parametrize("variant", ["plain", "refine", "two-stage"])
def test_names_of_modules_in_memory_and_of_older_releases(variant, tmp_path):
    model = theirs(variant)
    model.save_pretrained(tmp_path)
    expected = DeformableDETR.from_pretrained(tmp_path)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert same(expected, DeformableDETR.from_pretrained(tmp_path))
    described = json.loads((tmp_path / "config.json").read_text())
    del described["backbone_config"]
    old = {"backbone": "test_resnet", "use_timm_backbone": True, "backbone_config": None}
    (tmp_path / "config.json").write_text(json.dumps({**described, **old}))
    assert same(expected, DeformableDETR.from_pretrained(tmp_path))


def test_class_heads_of_its_own_for_each_layer_without_two_stage(tmp_path):
    """Transformers 5 ties them when it makes a model, but published repositories have one a layer."""
    model = theirs("refine")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in (1, 2):
        for part in ("weight", "bias"):
            tensors[f"class_embed.{layer}.{part}"] = tensors[f"class_embed.0.{part}"] + layer
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    there = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path)
    here = DeformableDETR.from_pretrained(tmp_path)
    assert not torch.equal(here.decoder.heads.classes[0].bias, here.decoder.heads.classes[2].bias)
    compare(there.eval(), here, torch.float64)
    # One that is missing in the middle is missing, not tied.
    del tensors["class_embed.1.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks class_embed\.1\.bias"):
        DeformableDETR.from_pretrained(tmp_path)


def test_config_and_names_are_read(tmp_path):
    names = ["person", "N/A", "traffic light", "N/A", "été"]
    model = theirs(id2label=dict(enumerate(names)), label2id={}, activation_function="swish")
    model.save_pretrained(tmp_path)
    size = {"shortest_edge": 480, "longest_edge": 640}
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": size, **statistics}))
    found = DeformableDETR.from_pretrained(tmp_path)
    assert found.config.class_names == tuple(names)
    assert found.config.category_ids == (0, 1, 2, 3, 4)
    assert (found.config.image_size, found.config.long_side) == (480, 640)
    assert (found.config.activation, found.config.num_queries, found.config.decoder_layers) == ("silu", 20, 3)
    assert found.pixel_mean.tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert found.pixel_std.tolist() == pytest.approx([0.2, 0.25, 0.3])


@pytest.mark.parametrize(
    ("preprocessor", "expected"),
    [
        ({}, (800, 1333, 0.485, 0.229)),
        ({"size": 600, "max_size": 900}, (600, 900, 0.485, 0.229)),
        ({"size": 480}, (480, 1333, 0.485, 0.229)),
        ({"size": {"shortest_edge": 480}}, (480, 800, 0.485, 0.229)),
        ({"size": {"height": 640, "width": 480}}, (480, 640, 0.485, 0.229)),
        ({"do_normalize": False}, (800, 1333, 0.0, 1.0)),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}, (800, 1333, 0.5, 0.2)),
        ({"rescale_factor": 1.0, "do_normalize": False}, (800, 1333, 0.0, 1 / 255)),
    ],
)
def test_image_processor(repo, preprocessor, expected):
    (repo / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    found = DeformableDETR.from_pretrained(repo).config
    assert (found.image_size, found.long_side) == expected[:2]
    assert (found.pixel_mean[0], found.pixel_std[0]) == pytest.approx(expected[2:])


def test_precision_of_the_weights(repo):
    assert DeformableDETR.from_pretrained(repo).level_embedding.dtype == torch.float32
    model = theirs().double()
    model.save_pretrained(repo)
    found = DeformableDETR.from_pretrained(repo)
    assert found.level_embedding.dtype == torch.float64
    compare(model, found, torch.float64)
    theirs().bfloat16().save_pretrained(repo)
    assert DeformableDETR.from_pretrained(repo).level_embedding.dtype == torch.float32


def test_a_file_of_a_repository_means_the_repository(repo):
    assert same(DeformableDETR.from_pretrained(repo), DeformableDETR.from_pretrained(repo / "model.safetensors"))


def test_hub_id(repo, monkeypatch):
    import huggingface_hub

    asked = []

    def fetch(name, revision=None, allow_patterns=None):
        asked.append((name, revision))
        return str(repo)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert same(DeformableDETR.from_pretrained(repo), DeformableDETR.from_pretrained("someone/some-model@v1.0"))
    assert asked == [("someone/some-model", "v1.0")]

    def fail(*arguments, **options):
        raise OSError("no network\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"^model someone/some-model: .*no network$"):
        DeformableDETR.from_pretrained("someone/some-model")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("a path is no hub id"))
    with pytest.raises(UserError, match="no such folder"):
        DeformableDETR.from_pretrained(f"{os.path.relpath(repo.parent)}/repoo")


# --- official checkpoints -----------------------------------------------------------------------------------------


def checkpoint(tmp_path, model=None, **values):
    """An official checkpoint as a dict, and where to put it."""
    official.save(model or ours(presets.refine, backbone="resnet50"), tmp_path)
    path = tmp_path / official.FILE
    found = torch.load(path, weights_only=False)
    del found[official.OWN]
    return {**found, **values}, path


def test_official_checkpoint_with_and_without_settings(tmp_path):
    model = ours(presets.refine, backbone="resnet50")
    values, path = checkpoint(tmp_path, model, epoch=49, optimizer={"state": {}}, lr_scheduler={"last_epoch": 49})
    torch.save(values, path)
    found = DeformableDETR.from_pretrained(path)
    assert same(model, DeformableDETR(model.config)) is False
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.state_dict().items())
    assert (found.config.refine, found.config.feature_levels, found.config.num_queries) == (True, 4, 20)
    assert found.config.category_ids == (0, 1, 2)
    torch.save(values, path, _use_new_zipfile_serialization=False)  # the format of the published files
    assert same(found, DeformableDETR.from_pretrained(path))
    assert same(found, DeformableDETR.from_pretrained(tmp_path))  # the folder with nothing but it
    values["model"] = {f"module.{name}": value for name, value in values["model"].items()}
    values["model"]["module.transformer.total_ops"] = torch.zeros(1)
    torch.save(values, path)
    assert same(found, DeformableDETR.from_pretrained(path))
    assert isinstance(values["args"], argparse.Namespace)
    eight = ours(presets.multi_scale, backbone="resnet50", num_heads=8)
    values, path = checkpoint(tmp_path, eight)
    torch.save(values["model"], path)  # bare tensors: 8 heads, the paper's number, cannot be read off them
    found = DeformableDETR.from_pretrained(path)
    assert (found.config.num_heads, found.config.encoder_points, found.config.refine) == (8, 4, False)


def test_the_91_classes_of_coco_keep_their_ids(tmp_path):
    wide = {"num_classes": 91, "class_names": (), "category_ids": (), "backbone": "resnet50"}
    values, path = checkpoint(tmp_path, ours(presets.multi_scale, **wide))
    torch.save(values, path)
    found = DeformableDETR.from_pretrained(path).config
    assert found.category_ids == tuple(range(91))
    assert [found.class_names[label] for label in (0, 1, 12, 13, 90)] == [
        "N/A", "person", "N/A", "stop sign", "toothbrush",
    ]  # fmt: skip
    assert len({name for name in found.class_names if name != "N/A"}) == 80


def test_official_settings_that_contradict_the_tensors(tmp_path):
    values, path = checkpoint(tmp_path)
    for key, value in (("num_feature_levels", 1), ("with_box_refine", False), ("dec_layers", 6), ("hidden_dim", 256)):
        args = argparse.Namespace(**{**vars(values["args"]), key: value})
        torch.save({**values, "args": args}, path)
        with pytest.raises(UserError, match=f"settings say {key}"):
            DeformableDETR.from_pretrained(path)


# --- what is refused ----------------------------------------------------------------------------------------------


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
    (repo / "preprocessor_config.json").write_text('{"image_mean": "grey"}')
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
    torch.save({"model": {"backbone.weight": torch.zeros(1)}}, tmp_path / "detr.pth")
    torch.save({"model": {"a": [1, 2]}}, tmp_path / "odd.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "alone.safetensors")
    for name, message in (
        ("empty", "config.json"), ("image.pth", "broken"), ("detr.pth", "level_embed"), ("odd.pth", "no tensor"),
        ("list.pth", "dict"), ("alone.safetensors", "config.json beside"), ("gone", "no such"), ("gone.pth", "no such"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            DeformableDETR.from_pretrained(tmp_path / name)


# --- changes on loading -------------------------------------------------------------------------------------------


def test_changes_that_have_a_meaning(repo, tmp_path):
    found = DeformableDETR.from_pretrained(repo, image_size=320, max_size=500, num_queries=31, dropout=0.0)
    assert (found.config.image_size, found.config.long_side, found.config.num_queries) == (320, 500, 31)
    assert same(found, DeformableDETR.from_pretrained(repo))  # two-stage: queries come from the image
    assert found(*batch())["pred_logits"].shape[1] == 31

    ours(presets.refine).save_pretrained(tmp_path / "one-stage")
    whole = DeformableDETR.from_pretrained(tmp_path / "one-stage")
    fewer = DeformableDETR.from_pretrained(tmp_path / "one-stage", num_queries=7)
    assert torch.equal(fewer.query_embedding.weight, whole.query_embedding.weight[:7])
    with pytest.raises(UserError, match=r"num_queries 20.*--weights"):
        DeformableDETR.from_pretrained(tmp_path / "one-stage", num_queries=21)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_fewer_levels_keep_what_their_strides_learned(repo, levels):
    whole = DeformableDETR.from_pretrained(repo)
    fewer = DeformableDETR.from_pretrained(repo, feature_levels=levels)
    kept = {1: [2], 2: [1, 2], 3: [0, 1, 2]}[levels]
    assert torch.equal(fewer.level_embedding, whole.level_embedding[kept])
    there = whole.encoder.layers[0].self_attn.sampling_offsets.weight.view(4, 4, 4, 2, -1)
    here = fewer.encoder.layers[0].self_attn.sampling_offsets.weight.view(4, levels, 4, 2, -1)
    assert torch.equal(here, there[:, kept])
    for new, old in enumerate(kept):
        assert torch.equal(fewer.projections.levels[new][0].weight, whole.projections.levels[old][0].weight)
    assert fewer(*batch())["pred_logits"].isfinite().all()


def test_changes_that_have_none(repo):
    for changes, message in (
        ({"feature_levels": 5}, r"feature_levels 4.*--weights"),
        ({"hidden_dim": 128}, "hidden_dim"),
        ({"refine": False}, "refine"),
        ({"num_querys": 5}, "num_querys"),
        ({"num_queries": 0}, "num_queries"),
        ({"image_size": -1}, "image_size"),
        ({"class_names": ("a",)}, "class_names"),
    ):
        with pytest.raises(UserError, match=message):
            DeformableDETR.from_pretrained(repo, **changes)


def test_the_sources_config_is_returned_with_its_tensors(repo):
    found, state, model = source.read(repo)
    assert found == model.config
    assert state.keys() == model.state_dict().keys()
    assert found.num_classes == TINY["num_labels"]
    assert repository.read_config({"model_type": "deformable_detr"}, {}, repo).num_classes == 2
