"""Complete runs whose epochs do not show each image once: schedule and exact resume."""

import json

import pytest
import torch

from deformable_detr.detector import load_detector
from deformable_detr.evaluation import evaluator
from deformable_detr.training.checkpoint import load_checkpoint
from deformable_detr.training.run_dir import run_config
from deformable_detr.training.trainer import train_model
from tests.support.commands import run_command
from tests.support.training import metric_lines, tiny_config, train_until_signal, write_dataset


def sampled_config(**data):
    return tiny_config(total_batch_size=4, batch_size=2).updated({"data": data})


def rename_most_objects(root):
    """Give all objects but the first the class of the last."""
    path = root / "train/_annotations.coco.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"][1:]:
        annotation["category_id"] = 30
    content["annotations"][0]["category_id"] = 10
    path.write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return rename_most_objects(write_dataset(tmp_path_factory.mktemp("set"), train=10))


# settings, samples per epoch
REPEATED = {"repeat_threshold": 0.5}, 12  # one of ten images has the rare class: √(0.5 / 0.1) = 2.24 times, rounded up
TILED = {"tile": 48, "empty_tile_share": 0.3, "repeat_threshold": 0.5}, 57


@pytest.fixture(scope="module", params=[REPEATED, TILED])
def finished(request, data, tmp_path_factory):
    """The settings of data, the folder of an uninterrupted run and its metrics."""
    settings, samples = request.param
    out = tmp_path_factory.mktemp("runs") / "reference"
    metrics = train_model(data, out, sampled_config(**settings))
    steps = 2 * -(-samples // 4)
    assert (metrics["step"], metrics["images_seen"], metrics["epoch"]) == (steps, 2 * samples, 2)
    return settings, out, metrics


def model_weights(out):
    return load_checkpoint(out / "checkpoints" / "last")[0]["model"]


@pytest.mark.parametrize("stop_after", [2, 5])
def test_resumed_run_equals_an_uninterrupted_one(data, finished, tmp_path, monkeypatch, stop_after):
    settings, reference, reference_metrics = finished
    out = tmp_path / "run"
    train_until_signal(monkeypatch, data, out, sampled_config(**settings), stop_after)
    metrics = train_model(data, out, run_config(out), resume=True)
    assert {**metrics, "seconds": 0, "images_per_second": 0} == {
        **reference_metrics, "seconds": 0, "images_per_second": 0
    }  # fmt: skip
    first, second = model_weights(reference), model_weights(out)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert [record["loss"] for record in metric_lines(out)] == [record["loss"] for record in metric_lines(reference)]


def test_run_names_the_samples_of_an_epoch(data, tmp_path, capsys):
    config = sampled_config(repeat_threshold=0.5).updated({"train": {"epochs": 1}})
    train_model(data, tmp_path / "run", config)
    assert "data.repeat_threshold=0.5: an epoch has 12 samples, 2 of them repeated" in capsys.readouterr().err
    train_model(data, tmp_path / "other", config.updated({"data": {"repeat_threshold": 0.05}}))
    assert "data.repeat_threshold=0.05: an epoch has 10 samples, 0 of them repeated" in capsys.readouterr().err


def test_training_evaluates_whole_images_with_tiles(tmp_path, monkeypatch, capsys):
    data, out, tiles = write_dataset(tmp_path / "set"), tmp_path / "run", []
    detect = evaluator.detect_in_tiles
    monkeypatch.setattr(
        evaluator, "detect_in_tiles", lambda *args, **options: tiles.append(args[3].tile) or detect(*args, **options)
    )
    config = sampled_config(tile=40).updated({"train": {"epochs": 1}})
    metrics = train_model(data, out, config)
    assert tiles == [40]
    model = load_detector(out, "cpu")
    assert evaluator.evaluate(model, data, tile=40, progress=False, workers=0)["AP"] == metrics["AP"]
    assert 'model.predict("image.jpg", tile=40)' in (out / "README.md").read_text()
    image = next((data / "valid").glob("*.png"))
    assert run_command(capsys, "predict", out, image, "--tile", 40, "--device", "cpu")[0] == 0
