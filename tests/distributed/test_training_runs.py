"""Whole runs in two processes: the same as one, resumed by others, stopped by signals, faults and crashes."""

import json
import shutil

import pytest
import torch

from deformable_detr.training.checkpoint import load_checkpoint
from deformable_detr.training.run_dir import run_config as config_of
from deformable_detr.training.trainer import train_model
from tests.support.distributed_jobs import run_config
from tests.support.processes import launch
from tests.support.training import write_dataset

pytestmark = pytest.mark.slow


def lines(out, kind):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def weights(out):
    return load_checkpoint(out / "checkpoints" / "last")[0]["model"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    data = write_dataset(folder / "data", train=7, val=3)
    train_model(data, folder / "alone", run_config())
    train_model(data, folder / "one", run_config(epochs=1))
    ended = launch("runs", folder)
    assert [process.code for process in ended] == [0, 0], ended[0].output[-3000:] + ended[1].output[-3000:]
    return folder, ended


def test_two_processes_train_as_one(runs):
    folder, ended = runs
    assert [process.results["ddp"]["result"]["step"] for process in ended] == [4, 4]
    assert ended[0].results["ddp"] == ended[1].results["ddp"]
    assert ended[0].results["ddp"]["result"]["images_seen"] == 14
    alone, together = ([record["loss"] for record in lines(folder / name, "train")] for name in ("alone", "ddp"))
    assert together == pytest.approx(alone, rel=1e-3)
    first, second = weights(folder / "alone"), weights(folder / "ddp")
    assert all(torch.allclose(value, second[name], atol=1e-3) for name, value in first.items())


def test_only_the_first_process_speaks_and_writes(runs):
    folder, ended = runs
    assert "total batch size 4 (2 processes × 1 × 2 at most)" in ended[0].output
    assert "total batch size" not in ended[1].output
    assert [record["step"] for record in lines(folder / "ddp", "train")] == [1, 2, 3, 4]
    assert len(lines(folder / "ddp", "evaluation")) == 2


def test_a_run_changes_the_number_of_its_processes(runs):
    folder, ended = runs
    assert ended[0].results["one resumed"]["result"]["step"] == 4  # began alone
    longer = config_of(folder / "ddp").updated({"train": {"epochs": 3}})
    shutil.copytree(folder / "ddp", folder / "two-to-one")
    metrics = train_model(folder / "data", folder / "two-to-one", longer, resume=True)
    assert (metrics["step"], metrics["images_seen"]) == (6, 21)


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluations")
    write_dataset(folder / "five", val=5)
    write_dataset(folder / "one", val=1)
    ended = launch("evaluations", folder)
    assert [process.code for process in ended] == [0, 0], ended[0].output[-3000:] + ended[1].output[-3000:]
    return [process.results for process in ended]


@pytest.mark.parametrize("name", ["five", "one"])
def test_figures_of_two_processes_are_those_of_one(evaluations, name):
    for results in evaluations:
        together, alone = results[name]["together"], results[name]["alone"]
        for figures in (together, alone):
            figures.pop("images_per_second")
        assert together == alone
        assert together["images"] == results[name]["images"]


@pytest.fixture(scope="module")
def accidents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accidents")
    write_dataset(folder / "data", train=8, val=2)
    broken = write_dataset(folder / "broken", train=8, val=2)
    (broken / "train" / "3.png").unlink()
    ended = launch("accidents", folder)
    assert [process.code for process in ended] == [0, 0], ended[0].output[-3000:] + ended[1].output[-3000:]
    return folder, [process.results for process in ended]


def test_a_signal_to_one_process_stops_all_at_the_same_step(accidents):
    folder, results = accidents
    assert [found["signal"] for found in results] == [{"exit": 143}] * 2
    assert [found["afterwards"]["result"]["step"] for found in results] == [4, 4]
    assert [record["step"] for record in lines(folder / "signal", "train")] == [1, 2, 3, 4]


def test_a_nan_in_one_process_stops_all_and_is_named_once(accidents):
    folder, results = accidents
    assert results[0]["nan"]["kind"] == "NonFiniteLoss"
    assert "step 3" in results[0]["nan"]["error"]
    assert results[1]["nan"] == {"exit": 2}
    tensors, state = load_checkpoint(folder / "nan" / "checkpoints" / "last")
    assert state["train_state"]["step"] == 2
    assert all(value.isfinite().all() for value in tensors["model"].values())


def test_an_unreadable_image_of_one_process_stops_all(accidents):
    _, results = accidents
    endings = sorted(json.dumps(found["image"]) for found in results)
    assert "3.png" in endings[0]
    assert json.loads(endings[1]) == {"exit": 2}


def test_a_process_that_dies_ends_the_run_and_torchrun_goes_on(tmp_path):
    write_dataset(tmp_path / "data", train=8, val=2)
    first, second = launch("crash", tmp_path)
    assert second.code == -9
    assert "ended unexpectedly" in first.results["run"]["error"]
    assert "Traceback" not in first.output
    again = launch("crash", tmp_path, TORCHELASTIC_RESTART_COUNT="1")
    assert [process.results["run"]["result"]["step"] for process in again] == [4, 4]


def test_the_watchdog_bites(tmp_path):
    with pytest.raises(pytest.fail.Exception, match="hangs"):
        launch("stuck", tmp_path, limit=1)
