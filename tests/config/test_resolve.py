"""Precedence: preset < file < --set < option."""

import pytest

from deformable_detr import UserError
from deformable_detr.config import presets
from deformable_detr.config.resolve import resolve_config


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("preset: refine\ntrain: {lr: 2, seed: 2, batch_size: 2}\nmodel: {num_queries: 2}\n")
    return path


def test_default_is_the_small_preset():
    assert resolve_config() == presets.config("small")


def test_later_sources_take_precedence(file):
    config = resolve_config(
        None, file, ["train.seed=3", "train.batch_size=3"], {"train.batch_size": 4, "train.lr": None}
    )
    assert (config.train.lr, config.train.seed, config.train.batch_size) == (2, 3, 4)
    assert config.preset == "refine"
    assert config.model == presets.refine(num_queries=2)


def test_preset_option_overrides_the_file(file):
    config = resolve_config("single-scale", file)
    assert config.preset == "single-scale"
    assert config.model == presets.single_scale(num_queries=2)
    assert resolve_config(None, file, ["preset=small"]).preset == "small"


def test_settings_are_validated_together():
    config = resolve_config("small", None, ["model.hidden_dim=60"], {"model.num_heads": 3})
    assert (config.model.hidden_dim, config.model.num_heads) == (60, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overrides": ["train.epochs=0"]}, r"^--set: train\.epochs"),
        ({"options": {"train.epochs": 0}}, r"^options: train\.epochs"),
        ({"overrides": ["model.hidden_dim=64"], "options": {"model.num_heads": 7}}, "num_heads 7"),
        ({"preset": "huge"}, "^unknown preset 'huge'; choose from .*small"),
        ({"overrides": ["preset=[1]"]}, r"^preset must be a name, not \[1\]"),
    ],
)
def test_errors_name_their_source(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve_config(**arguments)
    assert "\n" not in str(caught.value)


def test_error_in_the_file_names_the_file(file):
    file.write_text("train: {momentum: 1}")
    with pytest.raises(UserError, match=r"^config file .*mine\.yaml: unknown key 'train\.momentum'"):
        resolve_config(None, file)


def test_conflicting_settings_are_reported():
    # Each is valid with the preset alone, but not both.
    settings = {"overrides": ["model.hidden_dim=68"], "options": {"model.num_heads": 8}}
    assert resolve_config(overrides=settings["overrides"]).model.hidden_dim == 68
    assert resolve_config(options=settings["options"]).model.num_heads == 8
    with pytest.raises(UserError, match=r"^combined settings: model: hidden_dim 68 is not divisible by num_heads 8"):
        resolve_config(**settings)
    with pytest.raises(UserError, match=r"^--set train\.lr=1: 'train' already has a value"):
        resolve_config(overrides=["train=5", "train.lr=1"])


def test_epochs_and_minutes(file):
    both = resolve_config(options={"train.epochs": 3, "train.minutes": 2.0}).train
    assert (both.epochs, both.minutes) == (3, 2.0)
    minutes = resolve_config(options={"train.minutes": 2.0}).train
    assert (minutes.epochs, minutes.minutes) == (None, 2.0)
    epochs = resolve_config(overrides=["train.minutes=5"], options={"train.epochs": 3}).train
    assert (epochs.epochs, epochs.minutes) == (3, None)
    assert resolve_config(overrides=["train.minutes=5"]).train.epochs == "auto"
