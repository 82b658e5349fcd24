"""from_pretrained: every kind of source, its config and class names, and what is refused."""

import argparse
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from deformable_detr import DeformableDETR, UserError
from deformable_detr.config import presets
from deformable_detr.weights import load, official_format, transformers_format
from tests.model.test_parity import TINY, batch, compare, config, randomized, transformers

OURS = {
    "backbone": "test_resnet", "backbone_weights": "none", "hidden_dim": 64, "num_heads": 4, "ffn_dim": 48,
    "encoder_layers": 1, "decoder_layers": 2, "num_queries": 20, "num_classes": 3,
    "class_names": ("cat", "dog", "cow"), "category_ids": (3, 1, 90),
}  # fmt: skip


def ours(variant=presets.two_stage, **changes) -> DeformableDETR:
    torch.manual_seed(0)
    return randomized(DeformableDETR(variant(**{**OURS, **changes})))


def theirs(variant="two-stage", **changes):
    return randomized(transformers.DeformableDetrForObjectDetection(config(variant, 4, **changes)))


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
    official_format.save(model or ours(presets.refine, backbone="resnet50"), tmp_path)
    path = tmp_path / official_format.FILE
    found = torch.load(path, weights_only=False)
    del found[official_format.OWN]
    return {**found, **values}, path


def test_official_checkpoint_with_and_without_settings(tmp_path):
    model = ours(presets.refine, backbone="resnet50")
    values, path = checkpoint(tmp_path, model, epoch=49, optimizer={"state": {}}, lr_scheduler={"last_epoch": 49})
    torch.save(values, path)
    found = DeformableDETR.from_pretrained(path)
    assert same(model, DeformableDETR(model.config)) is False
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.state_dict().items())
    assert (found.config.refine, found.config.num_feature_levels, found.config.num_queries) == (True, 4, 20)
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
    fewer = DeformableDETR.from_pretrained(repo, num_feature_levels=levels)
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
        ({"num_feature_levels": 5}, r"num_feature_levels 4.*--weights"),
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
    found, state, model = load.read(repo)
    assert found == model.config
    assert state.keys() == model.state_dict().keys()
    assert found.num_classes == TINY["num_labels"]
    assert transformers_format.read_config({"model_type": "deformable_detr"}, {}, repo).num_classes == 2
