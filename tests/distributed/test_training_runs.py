"""Complete runs in two processes: equal to one process, resumable, and stopped by signals, errors and crashes."""

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
    train_model(data, folder / "single", run_config())
    train_model(data, folder / "one", run_config(epochs=1))
    processes = launch("runs", folder)
    assert [process.code for process in processes] == [0, 0], processes[0].output[-3000:] + processes[1].output[-3000:]
    return folder, processes


def test_two_processes_train_like_one(runs):
    folder, processes = runs
    assert [process.results["ddp"]["result"]["step"] for process in processes] == [4, 4]
    assert processes[0].results["ddp"] == processes[1].results["ddp"]
    assert processes[0].results["ddp"]["result"]["images_seen"] == 14
    single, distributed = ([record["loss"] for record in lines(folder / name, "train")] for name in ("single", "ddp"))
    assert distributed == pytest.approx(single, rel=1e-3)
    # A group norm of one channel per group follows these biases: their gradient is 0 but for rounding.
    noise = {f"projections.levels.{level}.0.bias" for level in range(2)}
    first, second = (
        {name: value for name, value in weights(folder / run).items() if name not in noise} for run in ("single", "ddp")
    )
    torch.testing.assert_close(second, first, atol=1e-3, rtol=0)


def test_only_rank_zero_logs_and_writes(runs):
    folder, processes = runs
    assert "total batch size 4 (2 processes × 1 × 2 at most)" in processes[0].output
    assert "total batch size" not in processes[1].output
    assert [record["step"] for record in lines(folder / "ddp", "train")] == [1, 2, 3, 4]
    assert len(lines(folder / "ddp", "evaluation")) == 2


def test_resume_with_another_number_of_processes(runs):
    folder, processes = runs
    assert processes[0].results["one resumed"]["result"]["step"] == 4  # started in one process
    longer = config_of(folder / "ddp").updated({"train": {"epochs": 3}})
    shutil.copytree(folder / "ddp", folder / "two-to-one")
    metrics = train_model(folder / "data", folder / "two-to-one", longer, resume=True)
    assert (metrics["step"], metrics["images_seen"]) == (6, 21)


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluations")
    write_dataset(folder / "five", val=5)
    write_dataset(folder / "one", val=1)
    processes = launch("evaluations", folder)
    assert [process.code for process in processes] == [0, 0], processes[0].output[-3000:] + processes[1].output[-3000:]
    return [process.results for process in processes]


@pytest.mark.parametrize("name", ["five", "one"])
def test_distributed_evaluation_equals_one_process(evaluations, name):
    for results in evaluations:
        distributed, single = results[name]["distributed"], results[name]["single"]
        for metrics in (distributed, single):
            metrics.pop("images_per_second")
        assert distributed == single
        assert distributed["images"] == results[name]["images"]


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures")
    write_dataset(folder / "data", train=8, val=2)
    broken = write_dataset(folder / "broken", train=8, val=2)
    (broken / "train" / "3.png").unlink()
    processes = launch("failures", folder)
    assert [process.code for process in processes] == [0, 0], processes[0].output[-3000:] + processes[1].output[-3000:]
    return folder, [process.results for process in processes]


def test_signal_to_one_process_stops_all_at_the_same_step(failures):
    folder, results = failures
    assert [result["signal"] for result in results] == [{"exit": 143}] * 2
    assert [result["resumed"]["result"]["step"] for result in results] == [4, 4]
    assert [record["step"] for record in lines(folder / "signal", "train")] == [1, 2, 3, 4]


def test_nan_in_one_process_stops_all_and_is_reported_once(failures):
    folder, results = failures
    assert results[0]["nan"]["kind"] == "NonFiniteLoss"
    assert "step 3" in results[0]["nan"]["error"]
    assert results[1]["nan"] == {"exit": 2}
    tensors, state = load_checkpoint(folder / "nan" / "checkpoints" / "last")
    assert state["train_state"]["step"] == 2
    assert all(value.isfinite().all() for value in tensors["model"].values())


def test_unreadable_image_in_one_process_stops_all(failures):
    _, results = failures
    endings = sorted(json.dumps(result["image"]) for result in results)
    assert "3.png" in endings[0]
    assert json.loads(endings[1]) == {"exit": 2}


def test_killed_process_ends_the_run_and_a_restart_resumes(tmp_path):
    write_dataset(tmp_path / "data", train=8, val=2)
    first, second = launch("crash", tmp_path)
    assert second.code == -9
    assert "ended unexpectedly" in first.results["run"]["error"]
    assert "Traceback" not in first.output
    restarted = launch("crash", tmp_path, TORCHELASTIC_RESTART_COUNT="1")
    assert [process.results["run"]["result"]["step"] for process in restarted] == [4, 4]


def test_timeout_kills_all_processes(tmp_path):
    with pytest.raises(pytest.fail.Exception, match="hangs"):
        launch("stuck", tmp_path, limit=1)
