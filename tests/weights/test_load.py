"""from_pretrained: the kinds of sources, and config fields that can be overridden."""

import os

import pytest
import torch
from safetensors.torch import save_file

from deformable_detr import DeformableDETR, UserError
from deformable_detr.config import presets
from tests.support.parity import batch
from tests.support.weights import edit_json, equal_weights, load_error, read_tensors, tiny_model, write_tensors


def test_a_native_folder(native_model, native_folder):
    model = DeformableDETR.from_pretrained(native_folder)
    assert type(model) is DeformableDETR
    assert not model.training
    assert model.config == native_model.config
    assert equal_weights(native_model, model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2; this release reads version 1"),
        ({"model": None}, "config.json: model: ModelConfig: input should be"),
        ({"format": "other"}, "model_type None"),
    ],
)
def test_native_configs_that_cannot_be_read(native_folder, tmp_path, changes, message):
    (tmp_path / "config.json").write_text((native_folder / "config.json").read_text())
    write_tensors(tmp_path, read_tensors(native_folder))
    edit_json(tmp_path / "config.json", **changes)
    refused = load_error(tmp_path)
    assert message in refused
    assert str(tmp_path / "config.json") in refused


def test_native_tensors_that_do_not_fit(native_folder, tmp_path):
    (tmp_path / "config.json").write_text((native_folder / "config.json").read_text())
    tensors = read_tensors(native_folder)
    for message, changed in {
        "lacks level_embedding": {name: value for name, value in tensors.items() if name != "level_embedding"},
        "level_embedding has shape": {**tensors, "level_embedding": torch.zeros(3, 64)},
        "level_embedding has dtype int8": {**tensors, "level_embedding": tensors["level_embedding"].to(torch.int8)},
        "does not call for: extra": {**tensors, "extra": torch.zeros(1)},
    }.items():
        write_tensors(tmp_path, changed)
        assert message in load_error(tmp_path)


def test_a_file_of_a_folder_means_the_folder(native_model, native_folder):
    assert equal_weights(native_model, DeformableDETR.from_pretrained(native_folder / "model.safetensors"))


def test_hub_id(shared_repo, monkeypatch):
    import huggingface_hub

    requests = []

    def fetch(name, revision=None, allow_patterns=None):
        requests.append((name, revision))
        return str(shared_repo)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    downloaded = DeformableDETR.from_pretrained("someone/some-model@v1.0")
    assert equal_weights(DeformableDETR.from_pretrained(shared_repo), downloaded)
    assert requests == [("someone/some-model", "v1.0")]

    def fail(*arguments, **options):
        raise OSError("no network\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert load_error("someone/some-model").endswith("the download failed: no network")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("a path is no hub id"))
    assert "no such folder" in load_error(f"{os.path.relpath(shared_repo.parent)}/repoo")


def test_other_sources(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    (tmp_path / "cards.onnx").write_bytes(b"\x08")
    (tmp_path / "several").mkdir()
    for name in "ab":
        (tmp_path / "several" / f"{name}.pth").touch()
    save_file({"a": torch.zeros(1)}, tmp_path / "alone.safetensors")
    for name, message in (
        ("empty", "has no config.json"), ("run", "this run has no model yet"), ("several", "name one of them"),
        ("alone.safetensors", "no config.json beside it"), ("cards.onnx", "is an exported file"),
        ("gone", "no such folder or file"), ("gone.pth", "no such folder or file"),
    ):  # fmt: skip
        refused = load_error(tmp_path / name)
        assert message in refused
        assert str(tmp_path / name) in refused
    for name in ("x" * 5000, "a/" * 3000, "nul\0", "", "https://example.org/model.pth"):
        assert load_error(name)


def test_overrides(shared_repo, tmp_path):
    model = DeformableDETR.from_pretrained(shared_repo, image_size=320, max_size=500, num_queries=31, dropout=0.0)
    assert (model.config.image_size, model.config.long_side, model.config.num_queries) == (320, 500, 31)
    assert equal_weights(model, DeformableDETR.from_pretrained(shared_repo))  # two-stage: queries come from the image
    assert model(*batch())["pred_logits"].shape[1] == 31

    one_stage = tiny_model(presets.refine)
    one_stage.save_pretrained(tmp_path)
    fewer = DeformableDETR.from_pretrained(tmp_path, num_queries=7)
    assert torch.equal(fewer.query_embedding.weight, one_stage.query_embedding.weight[:7])
    with pytest.raises(UserError, match=r"num_queries 20.*--weights"):
        DeformableDETR.from_pretrained(tmp_path, num_queries=21)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_fewer_levels_keep_what_their_strides_learned(native_model, native_folder, levels):
    fewer = DeformableDETR.from_pretrained(native_folder, num_feature_levels=levels)
    kept = {1: [2], 2: [1, 2], 3: [0, 1, 2]}[levels]
    assert torch.equal(fewer.level_embedding, native_model.level_embedding[kept])
    before = native_model.encoder.layers[0].self_attn.sampling_offsets.weight.view(4, 4, 4, 2, -1)
    after = fewer.encoder.layers[0].self_attn.sampling_offsets.weight.view(4, levels, 4, 2, -1)
    assert torch.equal(after, before[:, kept])
    for new, old in enumerate(kept):
        assert torch.equal(fewer.projections.levels[new][0].weight, native_model.projections.levels[old][0].weight)
    assert fewer(*batch())["pred_logits"].isfinite().all()


def test_overrides_that_are_not_possible(native_folder):
    for overrides, message in (
        ({"num_feature_levels": 5}, r"num_feature_levels 4.*--weights"),
        ({"hidden_dim": 128}, "hidden_dim cannot be overridden"),
        ({"num_querys": 5}, "num_querys cannot be overridden"),
        ({"num_queries": 0}, "num_queries"),
        ({"class_names": ("a",)}, "class_names"),
    ):
        with pytest.raises(UserError, match=message):
            DeformableDETR.from_pretrained(native_folder, **overrides)
