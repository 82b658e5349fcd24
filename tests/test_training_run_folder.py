import sys

import pytest

from deformable_detr.data.coco import open_dataset
from deformable_detr.errors import UserError
from deformable_detr.training.checkpoint import save_checkpoint
from deformable_detr.training.run_folder import RunFolder, fingerprint, run_config
from training_fakes import tiny_config, write_dataset


def test_a_new_folder_is_made(tmp_path):
    RunFolder(tmp_path / "a" / "b").claim(resume=False)
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("name", ["config.yaml", "config.json", "model.safetensors", "metrics.jsonl", "checkpoints"])
def test_a_folder_with_a_run_or_model_is_not_written_over(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match=f"{name}.*--resume.*another folder"):
        RunFolder(tmp_path).claim(resume=False)
    assert (tmp_path / name).read_text() == "precious"


def test_a_folder_with_other_things_is_used(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder(tmp_path).claim(resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"{out} cannot be written"):
            RunFolder(out).claim(resume=False)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no folders from anybody, root included")
def test_an_unwritable_folder_is_named():
    with pytest.raises(UserError, match="/proc/run cannot be written"):
        RunFolder("/proc/run").claim(resume=False)


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        RunFolder(tmp_path).claim(resume=True)
    with pytest.raises(UserError, match="nothing to resume"):
        run_config(tmp_path)
    assert not (tmp_path / "missing").exists()


def test_config_goes_out_and_back(tmp_path):
    config = tiny_config(minutes=3.0, epochs=None)
    RunFolder(tmp_path).write_config(config)
    assert run_config(tmp_path) == config


def state_of(config, data="same"):
    return {"model": config.model.model_dump(mode="json"), "data": data}


def test_restore(tmp_path):
    folder, config = RunFolder(tmp_path), tiny_config()
    assert folder.restore(config, "same") is None
    save_checkpoint(folder.last, {"model": {}}, state_of(config))
    restored = folder.restore(config.merged({"train": {"epochs": 9}, "model": {"backbone_weights": "hub"}}), "same")
    assert restored is not None
    assert restored[1] == state_of(config)


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        ({"class_names": ("a", "b", "c")}, "same", "classes are not those of the run"),
        ({}, "other", "training set has changed"),
        ({"hidden_dim": 64}, "same", "model.hidden_dim is 32 in the run and 64 now"),
    ],
)
def test_restore_refuses_what_is_not_the_run_s(tmp_path, change, data, message):
    folder, config = RunFolder(tmp_path), tiny_config()
    save_checkpoint(folder.last, {"model": {}}, state_of(config))
    with pytest.raises(UserError, match=message):
        folder.restore(config.merged({"model": change}), data)


def test_fingerprint_follows_the_annotations_and_not_the_place(tmp_path):
    sets = [open_dataset(write_dataset(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    first, same, other = map(fingerprint, sets)
    assert first == same
    assert first != other
