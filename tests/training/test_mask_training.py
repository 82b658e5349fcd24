"""Complete runs with masks: log, resume, and training sets with few or no masks."""

import logging

import pytest
import torch

from deformable_detr import DeformableDETR, UserError
from deformable_detr.training.checkpoint import load_checkpoint
from deformable_detr.training.run_dir import run_config
from deformable_detr.training.trainer import train_model
from tests.support.training import metric_lines, tiny_config, train_until_signal, write_dataset


def mask_config(**train):
    changes = {"num_denoising": 10, "ema_decay": 0.9, "mask_points": 16, **train}
    return tiny_config().updated({"model": {"masks": True}, "train": changes})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("set"), mask_every=1)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "reference"
    return out, train_model(data, out, mask_config())


def test_the_log_has_the_mask_losses_of_all_layers(finished):
    first = metric_lines(finished[0])[0]
    names = {f"{name}{suffix}" for name in ("loss_mask", "loss_dice") for suffix in ("", "_0", "_denoising")}
    assert names <= first.keys()
    assert all(0 < first[name] < 10 for name in names)
    assert "loss_mask_encoder" not in first


def test_the_model_of_the_run_predicts_masks(finished, data):
    model = DeformableDETR.from_pretrained(finished[0])
    detections = model.predict(data / "valid" / "0.png", threshold=0.0)
    assert detections.masks is not None
    assert detections.masks.shape == (len(detections), 64, 64)
    averaged = load_checkpoint(finished[0] / "checkpoints" / "last")[0]["ema"]
    assert any("mask_head" in name for name in averaged)


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resumed_run_equals_an_uninterrupted_one(data, finished, tmp_path, monkeypatch, stop_after):
    """The points of the losses come from the generator that the checkpoint restores."""
    out, config = tmp_path / "run", mask_config()
    train_until_signal(monkeypatch, data, out, config, stop_after)
    train_model(data, out, run_config(out), resume=True)
    folders = [folder / "checkpoints" / "last" for folder in (finished[0], out)]
    first, second = (load_checkpoint(folder)[0]["model"] for folder in folders)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    losses = [[record["loss_mask"] for record in metric_lines(folder)] for folder in (finished[0], out)]
    assert losses[0] == losses[1]


def test_a_training_set_without_masks_is_refused(tmp_path):
    data = write_dataset(tmp_path / "set")
    with pytest.raises(
        UserError, match=r"_annotations\.coco\.json has no masks; use --no-masks to train on its boxes$"
    ):
        train_model(data, tmp_path / "run", mask_config())
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_objects_without_a_mask_are_counted(tmp_path, caplog):
    data = write_dataset(tmp_path / "set", mask_every=2)
    with caplog.at_level(logging.WARNING):
        train_model(data, tmp_path / "run", mask_config(epochs=1))
    assert "6 of 12 training objects have a mask; the others train their box only" in caplog.text
    assert metric_lines(tmp_path / "run")[0]["loss_mask"] > 0


def test_boxes_only_runs_read_no_masks(data, tmp_path):
    train_model(data, tmp_path / "run", tiny_config(epochs=1))
    assert not any("mask" in name or "dice" in name for name in metric_lines(tmp_path / "run")[0])
    assert DeformableDETR.from_pretrained(tmp_path / "run").mask_head is None
