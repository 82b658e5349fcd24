from typing import get_type_hints

import pytest

from deformable_detr.config.schema import DataConfig, ModelConfig, TrainConfig
from deformable_detr.training.api import _config, train
from deformable_detr.training.run_dir import RunDir
from deformable_detr.utils.errors import UserError
from tests.support.training import tiny_config, write_dataset

CLASSES = {"class_names", "category_ids", "num_classes"}  # from the dataset


def test_option_names_are_unique_and_differ_from_arguments():
    names = [name for kind in (ModelConfig, DataConfig, TrainConfig) for name in kind.model_fields]
    assert len(set(names)) == len(names)
    assert not {"data", "out", "preset", "resume"} & set(names)


def test_named_arguments_have_the_types_of_their_fields():
    hints, fields = get_type_hints(train), get_type_hints(TrainConfig)
    assert (hints["minutes"], hints["weights"]) == (fields["minutes"], fields["weights"])
    assert (hints["epochs"], hints["image_size"]) == (int | None, int | None)


def test_options_of_every_section(tmp_path):
    config = _config(tmp_path, "refine", False, {"lr": 0.5, "epochs": 3, "num_queries": 7, "hflip_prob": 0.0})
    assert (config.train.lr, config.train.epochs, config.model.num_queries, config.data.hflip_prob) == (0.5, 3, 7, 0.0)
    assert (config.preset, config.model.refine, config.model.two_stage) == ("refine", True, False)


def test_epochs_and_minutes(tmp_path):
    assert _config(tmp_path, "small", False, {}).train.epochs == "auto"
    timed = _config(tmp_path, "small", False, {"minutes": 2}).train
    assert (timed.epochs, timed.minutes) == (None, 2)
    both = _config(tmp_path, "small", False, {"minutes": 2, "epochs": 3}).train
    assert (both.epochs, both.minutes) == (3, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "unknown option 'epoch'; did you mean 'epochs'"),
        ({"lr": -1}, r"train\(\): train.lr"),
    ],
)
def test_invalid_options_are_reported(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        _config(tmp_path, "small", False, settings)


def test_resume_uses_the_config_of_the_run(tmp_path):
    RunDir(tmp_path).write_config(tiny_config(lr=0.25))
    config = _config(tmp_path, "small", True, {"epochs": 9})
    assert (config.train.lr, config.train.epochs, config.model.hidden_dim) == (0.25, 9, 32)
    with pytest.raises(UserError, match="nothing to resume"):
        _config(tmp_path / "none", "small", True, {})


def test_train(tmp_path):
    config = tiny_config(epochs=1).model_dump()
    options = {**config["model"], **config["data"], **config["train"]}
    data = write_dataset(tmp_path / "set", train=4)
    metrics = train(data, tmp_path / "run", **{name: options[name] for name in options.keys() - CLASSES})
    assert metrics["epoch"] == 1
    assert train(tmp_path / "set", tmp_path / "run", resume=True) == metrics
