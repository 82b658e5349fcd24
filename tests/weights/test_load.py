"""from_pretrained: supported sources and config overrides."""

import os

import pytest
import torch
from safetensors.torch import save_file

from deformable_detr import DeformableDETR, UserError
from deformable_detr.config import presets
from deformable_detr.utils import progress
from tests.support.parity import batch
from tests.support.weights import edit_json, equal_weights, load_error, read_tensors, tiny_model, write_tensors


def test_native_folder(native_model, native_folder):
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
def test_invalid_native_config_is_reported(native_folder, tmp_path, changes, message):
    (tmp_path / "config.json").write_text((native_folder / "config.json").read_text())
    write_tensors(tmp_path, read_tensors(native_folder))
    edit_json(tmp_path / "config.json", **changes)
    error = load_error(tmp_path)
    assert message in error
    assert str(tmp_path / "config.json") in error


def test_mismatched_native_tensors_are_reported(native_folder, tmp_path):
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


def test_path_of_the_weights_file_loads_its_folder(native_model, native_folder):
    assert equal_weights(native_model, DeformableDETR.from_pretrained(native_folder / "model.safetensors"))


def test_hub_id(shared_repo, monkeypatch):
    import huggingface_hub

    requests = []

    def fetch(name, revision=None, allow_patterns=None, **_):
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


def test_invalid_sources_are_reported(tmp_path):
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
        error = load_error(tmp_path / name)
        assert message in error
        assert str(tmp_path / name) in error
    for name in ("x" * 5000, "a/" * 3000, "nul\0", "", "https://example.org/model.pth"):
        assert load_error(name)


def test_overrides(shared_repo, tmp_path):
    model = DeformableDETR.from_pretrained(shared_repo, image_size=320, max_size=500, num_queries=31, dropout=0.0)
    assert (model.config.image_size, model.config.long_side, model.config.num_queries) == (320, 500, 31)
    assert equal_weights(model, DeformableDETR.from_pretrained(shared_repo))  # two-stage models have no learned queries
    assert model(*batch())["pred_logits"].shape[1] == 31

    one_stage = tiny_model(presets.refine)
    one_stage.save_pretrained(tmp_path)
    fewer = DeformableDETR.from_pretrained(tmp_path, num_queries=7)
    assert torch.equal(fewer.query_embedding.weight, one_stage.query_embedding.weight[:7])
    with pytest.raises(UserError, match=r"num_queries 20.*--weights"):
        DeformableDETR.from_pretrained(tmp_path, num_queries=21)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_fewer_levels_keep_the_weights_of_their_strides(native_model, native_folder, levels):
    fewer = DeformableDETR.from_pretrained(native_folder, num_feature_levels=levels)
    levels_kept = {1: [2], 2: [1, 2], 3: [0, 1, 2]}[levels]
    assert torch.equal(fewer.level_embedding, native_model.level_embedding[levels_kept])
    before = native_model.encoder.layers[0].self_attn.sampling_offsets.weight.view(4, 4, 4, 2, -1)
    after = fewer.encoder.layers[0].self_attn.sampling_offsets.weight.view(4, levels, 4, 2, -1)
    assert torch.equal(after, before[:, levels_kept])
    for new, old in enumerate(levels_kept):
        assert torch.equal(fewer.projections.levels[new][0].weight, native_model.projections.levels[old][0].weight)
    assert fewer(*batch())["pred_logits"].isfinite().all()


def test_invalid_overrides_are_rejected(native_folder):
    for overrides, message in (
        ({"num_feature_levels": 5}, r"num_feature_levels 4.*--weights"),
        ({"hidden_dim": 128}, "hidden_dim cannot be overridden"),
        ({"num_querys": 5}, "num_querys cannot be overridden"),
        ({"num_queries": 0}, "num_queries"),
        ({"class_names": ("a",)}, "class_names"),
    ):
        with pytest.raises(UserError, match=message):
            DeformableDETR.from_pretrained(native_folder, **overrides)


def test_downloads_from_the_hub_report_their_progress(shared_repo, monkeypatch, capsys):
    """On a terminal the hub's client has its own bars; elsewhere it has none."""
    import huggingface_hub

    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)

    def fetch(name, tqdm_class=None, **_):
        if tqdm_class is not None:
            options = {"unit": "B", "unit_scale": True, "initial": 0, "bar_format": "{bar}"}  # as the client does
            with tqdm_class(desc="Downloading bytes", total=4_000_000, **options) as bar:
                bar.mininterval = 0.0
                bar.update(1_000_000)
        return str(shared_repo)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    DeformableDETR.from_pretrained("someone/some-model")
    assert "Downloading bytes: 1.00M of 4.00M B" in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    DeformableDETR.from_pretrained("someone/some-model")
    assert capsys.readouterr().err == ""
