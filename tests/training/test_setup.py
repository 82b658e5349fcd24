"""Resolution of "auto" options."""

import pytest

from deformable_detr.config import presets
from deformable_detr.training.setup import resolve_auto
from tests.support.training import tiny_config


@pytest.mark.parametrize(
    ("images", "epochs"), [(1, 150), (12, 150), (50, 73), (150, 42), (300, 30), (1876, 12), (118_000, 12)]
)
def test_smaller_datasets_train_for_more_epochs(images, epochs):
    assert resolve_auto(presets.config("small"), images)[0].train.epochs == epochs


def test_auto_options_are_resolved_and_noted():
    config, note = resolve_auto(presets.config("small"), 150)
    assert (config.train.epochs, config.train.eval_every) == (42, 1)
    assert note == "for 150 training images: train.epochs=42, train.eval_every=1"
    assert "epochs: 42\n" in config.to_yaml()


@pytest.mark.parametrize(("images", "eval_every"), [(1, 100), (20, 5), (100, 1), (5000, 1)])
def test_small_datasets_are_evaluated_less_often(images, eval_every):
    assert resolve_auto(presets.config("small"), images)[0].train.eval_every == eval_every


def test_explicit_options_are_kept():
    config = presets.config("small").updated({"train": {"epochs": None, "minutes": 5.0, "eval_every": 2}})
    assert resolve_auto(config, 150) == (config, None)
    assert resolve_auto(tiny_config(), 150) == (tiny_config(), None)
