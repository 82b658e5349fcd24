"""Training from Python: a preset and what should differ from it, in one call."""

from __future__ import annotations

import difflib
import os
from typing import Any

from ..config.resolve import resolve_config
from ..config.schema import Config, DataConfig, ModelConfig, TrainConfig
from ..utils.errors import UserError
from ..weights.finetune import starting_config
from .run_dir import run_config
from .trainer import train_model

_SECTIONS = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}


def train(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    preset: str | None = None,
    resume: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Trains a detector on the data set at `data`; the run and the best model are then in the folder `out`.

    preset: the variant to start from (`presets.PRESETS`); none: the network of `weights`, where they are given, and
        "small" where they are not.
    settings: any keys of the config by their own names, `epochs=3, image_size=320, hflip_prob=0.0`; those of the model
        and the training also together, `train={"epochs": 3}, model={"num_queries": 50}`. Of `epochs` and `minutes`, one
        alone ends the run.
    resume: go on with the run in `out`, with its own config (`preset` is not looked at) and these settings over it.

    Returns the figures of the last evaluation, as `training.loop.train_model` does; raises what it raises.

    >>> train("sets/cards", "runs/cards", epochs=30, image_size=480)  # doctest: +SKIP
    {'AP': 0.71, 'AP50': 0.93, …}
    """
    return train_model(data, out, _config(out, preset, resume, settings), resume=resume)


def _config(out: str | os.PathLike[str], preset: str | None, resume: bool, settings: dict[str, Any]) -> Config:
    values = _by_section(settings)
    if values.get("train", {}).keys() & {"epochs", "minutes"}:
        values["train"] = {"epochs": None, "minutes": None, **values["train"]}
    base = (
        run_config(out)
        if resume
        else resolve_config(
            preset, options={"train.weights": values.get("train", {}).get("weights")}, config_of_weights=starting_config
        )
    )
    return base.updated(values, "train()")


def _by_section(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Nested settings from a mixture of sections and single keys; every key is in one section only."""
    nested: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        if key in ("model", "train"):
            if not isinstance(value, dict):
                raise UserError(f"train(): {key} must be a dict of settings, not {value!r}")
            nested.setdefault(key, {}).update(value)
            continue
        section = next((name for name, kind in _SECTIONS.items() if key in kind.model_fields), None)
        if section is None:
            known = [name for kind in _SECTIONS.values() for name in kind.model_fields]
            close = difflib.get_close_matches(key, known, n=1)
            raise UserError(f"train(): unknown setting '{key}'" + (f"; did you mean '{close[0]}'?" if close else ""))
        nested.setdefault(section, {})[key] = value
    return nested
