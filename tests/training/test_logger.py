import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deformable_detr.config.schema import TrainConfig
from deformable_detr.training.logger import TrainingLogger, TrainState
from deformable_detr.utils.errors import UserError


def write(folder, *records, state=None, **options):
    logger = TrainingLogger(TrainConfig(**options), folder)
    with logger.open(state or TrainState()):
        for kind, record in records:
            logger.write(kind, record)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_records_are_written_to_jsonl_and_tensorboard(tmp_path):
    logger = TrainingLogger(TrainConfig(tensorboard=True), tmp_path)
    with logger.open(TrainState()):
        logger.write("train", {"step": 2, "loss": 1.5})
        assert lines(tmp_path) == [{"kind": "train", "step": 2, "loss": 1.5}], "others may read it during the run"
        logger.write("evaluation", {"step": 2, "AP": None, "AP50": 0.5, "per_class": {"a": 0.5}})
    assert lines(tmp_path)[1] == {"kind": "evaluation", "step": 2, "AP": None, "AP50": 0.5, "per_class": {"a": 0.5}}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss", "evaluation/AP50"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(2, 1.5)]


def test_resume_removes_records_after_the_checkpoint(tmp_path):
    write(tmp_path, *(("train", {"step": step}) for step in range(1, 5)))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    write(tmp_path, ("train", {"step": 3}), state=TrainState(step=2))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_resume_removes_an_evaluation_without_checkpoint(tmp_path):
    write(tmp_path, *((kind, {"step": step}) for step in (1, 2) for kind in ("train", "evaluation")))
    write(tmp_path, state=TrainState(step=2, evaluated_step=1))
    records = [(line["kind"], line["step"]) for line in lines(tmp_path)]
    assert records == [("train", 1), ("evaluation", 1), ("train", 2)]


def test_failed_write_names_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        TrainingLogger(TrainConfig(), tmp_path).write("train", {"step": 1})


def test_no_progress_bar_without_a_terminal(tmp_path, capsys):
    logger = TrainingLogger(TrainConfig(), tmp_path)
    with logger.open(TrainState()):
        logger.show_progress(TrainState(), 0.5)
        logger.print("epoch 1")
    captured = capsys.readouterr()
    assert captured.err == "epoch 1\n"
    assert captured.out == ""


def test_tensorboard_is_optional(tmp_path, monkeypatch):
    write(tmp_path, ("train", {"step": 1, "loss": 1.5}))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # not installed
    TrainingLogger(TrainConfig(), tmp_path)
    with pytest.raises(UserError, match=r"pip install 'deformable-detr\[tensorboard\]'"):
        TrainingLogger(TrainConfig(tensorboard=True), tmp_path)


@pytest.mark.parametrize(
    ("aps", "best", "best_ap", "stale"),
    [([0.2, 0.5, 0.4], [True, True, False], 0.5, 1), ([0.0, 0.0], [True, True], 0.0, 0),
     ([None, None], [True, True], None, 0), ([0.3, 0.3], [True, True], 0.3, 1)],
)  # fmt: skip
def test_best_evaluation_is_recorded(aps, best, best_ap, stale):
    state = TrainState(step=7)
    assert [state.record_evaluation({"AP": ap}) for ap in aps] == best
    assert (state.best_ap, state.stale_evaluations, state.evaluated_step) == (best_ap, stale, 7)
