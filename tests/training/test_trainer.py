import json
import os
import re
import signal

import pytest
import torch

from deformable_detr.detector import DeformableDETR
from deformable_detr.evaluation import evaluator
from deformable_detr.training import trainer
from deformable_detr.training.checkpoint import load_checkpoint
from deformable_detr.training.run_dir import run_config
from deformable_detr.training.signals import NonFiniteLoss, TrainingInterrupted
from deformable_detr.training.step import TrainStep
from deformable_detr.training.trainer import TrainState, train_model
from deformable_detr.utils.errors import UserError
from tests.support.training import metric_lines, tiny_config, train_until_signal, write_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of two epochs and its returned metrics."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    return out, train_model(data, out, tiny_config())


def model_weights(folder):
    return load_checkpoint(folder)[0]["model"]


def test_run_folder_contents(finished):
    out, metrics = finished
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "config.json", "model.safetensors", "README.md", "metrics.jsonl", "checkpoints",
        "gallery", "training.html",
    }  # fmt: skip
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"last", "best"}
    assert (metrics["epoch"], metrics["step"], metrics["images_seen"]) == (2, 4, 16)
    assert {"AP", "AP50", "per_class", "best_AP", "seconds"} <= metrics.keys()
    assert set(metrics["per_class"]) == {"red", "green", "blue"}


def test_random_numbers_of_the_caller_are_restored(data, tmp_path):
    before = torch.get_rng_state()
    train_model(data, tmp_path / "run", tiny_config(epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_readable_by_other_users(data, tmp_path):
    (tmp_path / "run").mkdir(mode=0o755)
    train_model(data, tmp_path / "run", tiny_config(epochs=1))
    files = list((tmp_path / "run").rglob("*.safetensors"))
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}


def test_model_keeps_the_classes_of_the_dataset(finished):
    out, _ = finished
    model = DeformableDETR.from_pretrained(out)
    assert model.config.class_names == ("red", "green", "blue")
    assert model.config.category_ids == (10, 20, 30)
    assert run_config(out).model.num_classes == 3
    best = model_weights(out / "checkpoints" / "best")
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())


def test_metrics_log_has_steps_and_evaluations(finished):
    out, metrics = finished
    train, evaluations = metric_lines(out), metric_lines(out, "evaluation")
    assert [record["step"] for record in train] == [1, 2, 3, 4]
    assert [record["images_seen"] for record in train] == [4, 8, 12, 16]
    assert {"epoch", "lr", "grad_norm", "seconds", "images_per_second", "loss", "loss_class", "loss_bbox_0",
            "loss_giou_encoder", "cardinality_error"} <= train[0].keys()  # fmt: skip
    assert [(record["step"], record["epoch"]) for record in evaluations] == [(2, 1), (4, 2)]
    assert evaluations[-1]["AP"] == metrics["AP"]


def test_one_line_per_epoch_without_a_terminal(data, tmp_path, capsys):
    train_model(data, tmp_path / "run", tiny_config(epochs=3, eval_every=2))
    shown = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in shown] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert ["AP50" in line for line in shown] == [False, True, True]  # every second epoch and the last one


def test_second_run_in_the_same_folder_is_rejected(data, finished):
    out, _ = finished
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="--resume"):
        train_model(data, out, tiny_config())
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_resuming_a_finished_run_reports_it(data, finished, capsys):
    out, metrics = finished
    before = (out / "metrics.jsonl").read_text()
    assert train_model(data, out, run_config(out), resume=True) == metrics
    assert "is finished: 2 epochs, 4 steps" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("stop_after", "number"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (3, signal.SIGHUP)])
def test_resumed_run_equals_an_uninterrupted_one(data, finished, tmp_path, monkeypatch, stop_after, number, workers):
    """A signal within an epoch (1, 3) or at its end (2) must not change the weights."""
    out, config = tmp_path / "run", tiny_config().updated({"data": {"workers": workers}})
    assert train_until_signal(monkeypatch, data, out, config, stop_after, number) == 128 + number
    assert load_checkpoint(out / "checkpoints" / "last")[1]["train_state"]["step"] == stop_after

    metrics = train_model(data, out, run_config(out), resume=True)
    reference, reference_metrics = finished
    assert (metrics["step"], metrics["images_seen"]) == (4, 16)
    assert metrics["AP"] == reference_metrics["AP"]
    first, second = (model_weights(folder / "checkpoints" / "last") for folder in (reference, out))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    losses = [[record["loss"] for record in metric_lines(folder)] for folder in (reference, out)]
    assert losses[0] == losses[1]


def test_comparison_detects_another_data_order(data, finished, tmp_path):
    out, _ = finished
    train_model(data, tmp_path / "run", tiny_config(seed=1))
    first, second = (model_weights(folder / "checkpoints" / "last") for folder in (out, tmp_path / "run"))
    assert not all(torch.equal(value, second[name]) for name, value in first.items())


def test_crash_before_the_first_checkpoint_restarts(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(TrainStep, "step", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_model(data, out, tiny_config(epochs=1))
    assert train_model(data, out, run_config(out), resume=True)["step"] == 2
    assert "no checkpoint in this run yet" in capsys.readouterr().err


def test_run_killed_during_evaluation_evaluates_on_resume(data, tmp_path, monkeypatch, capsys):

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(evaluator, "evaluate_distributed", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(TrainingInterrupted) as caught:
            train_model(data, out, tiny_config(epochs=1))
    assert caught.value.code == 130
    assert "resume with --resume" in capsys.readouterr().err
    metrics = train_model(data, out, run_config(out), resume=True)
    assert metrics["step"] == 2
    assert len(metric_lines(out, "evaluation")) == 1


@pytest.mark.parametrize("name", ["TrainingLogger.log_evaluation", "update_state", "TrainingLogger.print_epoch"])
def test_run_killed_after_its_evaluation_logs_it_once(data, tmp_path, monkeypatch, name):
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(f"deformable_detr.training.trainer.{name}", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_model(data, out, tiny_config(epochs=1, eval_every=1))
    train_model(data, out, run_config(out), resume=True)
    assert [record["step"] for record in metric_lines(out, "evaluation")] == [2]
    assert (out / "training.html").is_file()


def test_resume_keeps_log_averages(data, tmp_path, monkeypatch, capsys):
    """The logged means cover more steps than an epoch has, and the printed loss is smoothed over all."""

    def printed() -> list[str]:
        return re.findall(r"epoch (\d/3: step \d, loss \d\S+),", capsys.readouterr().err)

    config = tiny_config(epochs=3, log_every=3, eval_every=3)
    train_model(data, tmp_path / "reference", config)
    expected = printed()
    assert len(expected) == 3
    with monkeypatch.context() as patched:
        original = TrainStep.step

        def step(self, *arguments, **options):
            if self.steps == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            self.steps += 1
            return original(self, *arguments, **options)

        patched.setattr(TrainStep, "steps", 0, raising=False)
        patched.setattr(TrainStep, "step", step)
        with pytest.raises(TrainingInterrupted):
            train_model(data, tmp_path / "run", config)
    train_model(data, tmp_path / "run", run_config(tmp_path / "run"), resume=True)
    assert printed() == [expected[0], expected[2]]  # the signal came before the line of epoch 2
    times = ("seconds", "images_per_second")
    records = [
        [{key: value for key, value in record.items() if key not in times} for record in metric_lines(tmp_path / out)]
        for out in ("reference", "run")
    ]
    assert records[0] == records[1]
    assert [record["step"] for record in records[0]] == [3, 6]


def test_resume_with_more_epochs(data, tmp_path):
    out = tmp_path / "run"
    train_model(data, out, tiny_config(epochs=1))
    metrics = train_model(data, out, run_config(out).updated({"train": {"epochs": 2}}), resume=True)
    assert metrics["epoch"] == 2
    assert run_config(out).train.epochs == 2


def test_resume_with_another_dataset_is_rejected(finished, tmp_path):
    out, _ = finished
    with pytest.raises(UserError, match="training set has changed"):
        train_model(write_dataset(tmp_path / "other", seed=9), out, run_config(out), resume=True)


def test_damaged_checkpoint_is_reported(data, tmp_path):
    out = tmp_path / "run"
    train_model(data, out, tiny_config(epochs=1))
    for path in (out / "checkpoints").glob("*/model-*"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"last/model-1\.safetensors is damaged"):
        train_model(data, out, run_config(out), resume=True)


def test_time_limit_ends_with_an_evaluation(data, tmp_path, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: float(next(clock)))  # each call advances one second
    metrics = train_model(data, tmp_path / "run", tiny_config(epochs=None, minutes=5 / 60, eval_every=100))
    assert (metrics["step"], metrics["seconds"]) == (5, 5.0)
    assert [record["step"] for record in metric_lines(tmp_path / "run", "evaluation")] == [5]
    assert [record["progress"] for record in metric_lines(tmp_path / "run")] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])


def test_nan_loss_stops_with_an_intact_checkpoint(data, tmp_path, monkeypatch):
    out, original = tmp_path / "run", TrainStep.step

    def step(self, micro_batches, global_step, progress, stats=None):
        if global_step == 3:
            with torch.no_grad():
                self.model.level_embedding.fill_(float("nan"))
        return original(self, micro_batches, global_step, progress, stats)

    with monkeypatch.context() as patched:
        patched.setattr(TrainStep, "step", step)
        with pytest.raises(NonFiniteLoss, match=r"step 4: loss nan.*images 10\d, 10\d"):
            train_model(data, out, tiny_config())
    tensors, state = load_checkpoint(out / "checkpoints" / "last")
    assert state["train_state"]["step"] == 2
    assert all(value.isfinite().all() for value in tensors["model"].values())
    assert train_model(data, out, run_config(out), resume=True)["step"] == 4


def test_nan_gradient_in_the_last_step_of_an_epoch_is_not_saved(data, tmp_path, monkeypatch):
    out, original = tmp_path / "run", TrainStep.step

    def step(self, micro_batches, global_step, progress, stats=None):
        if global_step == 3:
            self.model.level_embedding.register_hook(lambda gradient: gradient * float("nan"))
        return original(self, micro_batches, global_step, progress, stats)

    monkeypatch.setattr(TrainStep, "step", step)
    with pytest.raises(NonFiniteLoss, match="gradient of the loss is not finite at step 4"):
        train_model(data, out, tiny_config())
    assert load_checkpoint(out / "checkpoints" / "last")[1]["train_state"]["step"] == 2


def test_images_without_objects(tmp_path):
    data = write_dataset(tmp_path / "set", train=5, empty=4)  # at least one batch has no objects
    metrics = train_model(data, tmp_path / "run", tiny_config(epochs=1, batch_size=2))
    assert metrics["step"] == 3


def test_dataset_without_objects_is_rejected(tmp_path):
    data = write_dataset(tmp_path / "set", train=4, empty=4)
    with pytest.raises(UserError, match="has no objects to train on"):
        train_model(data, tmp_path / "run", tiny_config(epochs=1, batch_size=2))


def test_unwritable_folder_is_reported_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        train_model(tmp_path / "no such data", tmp_path / "file" / "run", tiny_config())


def test_missing_image_is_reported(tmp_path):
    data = write_dataset(tmp_path / "set")
    (data / "train" / "3.png").unlink()
    with pytest.raises(UserError, match=r"3\.png") as caught:
        train_model(data, tmp_path / "run", tiny_config().updated({"data": {"workers": 1}}))
    assert "\n" not in str(caught.value)


def test_best_and_last_checkpoints(data, tmp_path, monkeypatch):

    results = iter([0.2, 0.5, 0.4])
    monkeypatch.setattr(evaluator, "evaluate_distributed", lambda *_, **__: {"AP": next(results), "AP50": 0.6})
    metrics = train_model(data, tmp_path / "run", tiny_config(epochs=3))
    assert (metrics["AP"], metrics["best_AP"]) == (0.4, 0.5)
    states = {name: load_checkpoint(tmp_path / "run" / "checkpoints" / name)[1] for name in ("last", "best")}
    assert {name: state["train_state"]["epoch"] for name, state in states.items()} == {"last": 3, "best": 2}


def test_undefined_ap_keeps_the_latest_model(data, tmp_path, monkeypatch):

    monkeypatch.setattr(evaluator, "evaluate_distributed", lambda *_, **__: {"AP": None, "AP50": None})
    metrics = train_model(data, tmp_path / "run", tiny_config(epochs=2))
    assert metrics["best_AP"] is None
    best = load_checkpoint(tmp_path / "run" / "checkpoints" / "best")[1]
    assert best["train_state"]["epoch"] == 2


def test_resume_with_another_batch_size_continues_within_the_epoch(data, tmp_path, monkeypatch):
    out, original = tmp_path / "run", TrainStep.step

    def step(self, micro_batches, global_step, progress, stats=None):
        if global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, micro_batches, global_step, progress, stats)

    with monkeypatch.context() as patched:
        patched.setattr(TrainStep, "step", step)
        with pytest.raises(TrainingInterrupted):
            train_model(data, out, tiny_config(epochs=1, batch_size=2))  # two of four batches
    config = run_config(out).updated({"train": {"batch_size": 4}})
    assert train_model(data, out, config, resume=True)["images_seen"] == 8


def test_train_state_is_json_serializable():
    assert json.loads(json.dumps(vars(TrainState()))) == vars(TrainState())


def test_split_names_of_the_config_are_used(data, tmp_path):
    config = tiny_config(epochs=1).updated({"data": {"val_split": "train"}})
    with pytest.raises(UserError, match="annotations"):
        train_model(data, tmp_path / "run", config)  # both splits are one file


def test_gradient_accumulation_equals_one_large_batch(data, finished, tmp_path):
    """Norms are frozen because batch statistics depend on the micro-batch."""
    frozen = tiny_config(epochs=1, base_batch_size=8).updated({"model": {"backbone_norm": "frozen"}})
    for name, train in (("full", {"batch_size": 8}), ("accumulated", {"batch_size": 3, "total_batch_size": 8})):
        metrics = train_model(data, tmp_path / name, frozen.updated({"train": train}))
        assert (metrics["step"], metrics["images_seen"]) == (1, 8)
    full, accumulated = (metric_lines(tmp_path / name)[0] for name in ("full", "accumulated"))
    for name in ("loss", "grad_norm", "cardinality_error"):
        assert accumulated[name] == pytest.approx(full[name], rel=1e-4)


def test_resume_with_gradient_accumulation_within_an_epoch(data, tmp_path, monkeypatch):
    config = tiny_config(batch_size=2, total_batch_size=3, epochs=1, num_denoising=10).updated(
        {"data": {"aspect_ratio_grouping": True}}
    )
    train_model(data, tmp_path / "reference", config)
    original = TrainStep.step

    def step(self, micro_batches, global_step, progress, stats=None):
        if global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, micro_batches, global_step, progress, stats)

    with monkeypatch.context() as patched:
        patched.setattr(TrainStep, "step", step)
        with pytest.raises(TrainingInterrupted):
            train_model(data, tmp_path / "resumed", config)
    train_model(data, tmp_path / "resumed", run_config(tmp_path / "resumed"), resume=True)
    first, second = (model_weights(tmp_path / name / "checkpoints" / "last") for name in ("reference", "resumed"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_early_stopping(data, tmp_path, monkeypatch, capsys):

    results = iter([0.2, 0.5, 0.4, 0.5, 0.9, 0.9])
    monkeypatch.setattr(evaluator, "evaluate_distributed", lambda *_, **__: {"AP": next(results), "AP50": 0.6})
    metrics = train_model(data, tmp_path / "run", tiny_config(epochs=9, patience=2))
    assert (metrics["epoch"], metrics["best_AP"]) == (4, 0.5)
    assert "no better AP in 2 evaluations" in capsys.readouterr().err
    resumed = train_model(data, tmp_path / "run", run_config(tmp_path / "run"), resume=True)
    assert resumed["step"] == metrics["step"]
    longer = run_config(tmp_path / "run").updated({"train": {"patience": 3, "epochs": 5}})
    assert train_model(data, tmp_path / "run", longer, resume=True)["best_AP"] == 0.9


def test_early_stopping_with_equal_ap(data, tmp_path, monkeypatch):

    results = iter([0.0, 0.0, 0.0, 0.3, 0.3, 0.3, 0.9])
    monkeypatch.setattr(evaluator, "evaluate_distributed", lambda *_, **__: {"AP": next(results), "AP50": 0.6})
    metrics = train_model(data, tmp_path / "run", tiny_config(epochs=9, patience=2))
    assert (metrics["epoch"], metrics["best_AP"]) == (6, 0.3)
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "best")[1]["train_state"]["epoch"] == 6


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"ema_decay": 0.0}, {"ema_decay": 0.99}, "train.ema_decay"),
        ({"num_denoising": 0}, {"num_denoising": 20}, "train.num_denoising"),
        ({"ema_decay": 0.99}, {"ema_decay": 0.0}, None),
        ({"num_denoising": 20}, {"num_denoising": 0}, None),
    ],
)
def test_ema_and_denoising_can_be_disabled_but_not_enabled_on_resume(data, tmp_path, before, after, message):
    out = tmp_path / "run"
    train_model(data, out, tiny_config(epochs=1, **before))
    changed = run_config(out).updated({"train": {"epochs": 2, **after}})
    if message is None:
        assert train_model(data, out, changed, resume=True)["epoch"] == 2
    else:
        with pytest.raises(UserError, match=message):
            train_model(data, out, changed, resume=True)


def test_resume_with_more_frozen_backbone_stages(data, tmp_path):
    out = tmp_path / "run"
    train_model(data, out, tiny_config(epochs=1))
    changed = run_config(out).updated({"train": {"epochs": 2}, "model": {"frozen_stages": 2}})
    assert train_model(data, out, changed, resume=True)["epoch"] == 2


def test_mosaic_is_disabled_for_the_last_epochs(data, tmp_path, monkeypatch):
    from deformable_detr.data.dataloader import DistributedBatchSampler

    allowed, original = [], DistributedBatchSampler.set_epoch

    def set_epoch(self, epoch, start_step=0, step_stride=1, mosaic=False):
        if self.options.shuffle:
            allowed.append(mosaic)
        original(self, epoch, start_step, step_stride, mosaic)

    monkeypatch.setattr(DistributedBatchSampler, "set_epoch", set_epoch)
    config = tiny_config(epochs=4, eval_every=4).updated({"data": {"mosaic_prob": 0.5, "close_mosaic": 0.5}})
    train_model(data, tmp_path / "run", config)
    assert allowed == [True, True, False, False]


def test_run_restarted_by_torchrun_resumes(data, tmp_path, monkeypatch):
    train_model(data, tmp_path / "run", tiny_config(epochs=1))
    with pytest.raises(UserError, match="already holds a run"):
        train_model(data, tmp_path / "run", tiny_config(epochs=2))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train_model(data, tmp_path / "run", tiny_config(epochs=2))["step"] == 4
    assert train_model(data, tmp_path / "new", tiny_config(epochs=1))["step"] == 2  # failed before the first checkpoint
