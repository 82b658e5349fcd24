"""From a preset, a file, `--set` and options to one checked config; the later of these wins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from ..utils.errors import UserError
from . import presets
from .schema import Config, merge, parse_overrides, read_config_file


def resolve(
    preset: str | None = None,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    default_preset: str = "small",
    config_of_weights: Callable[[str], Config] | None = None,
) -> Config:
    """The config that a command runs with.

    Args:
        preset: Name of the preset to start from; none given: the file's `preset`, else the network of the model that
            "train.weights" names and the preset that it is like, else `default_preset`.
        file: YAML with some or all keys of a `Config`.
        overrides: `section.key=value` strings, values read as YAML.
        options: Values by dotted key, for example {"train.epochs": 3}; None means not given. Of "train.epochs" and
            "train.minutes", one alone ends the run: the preset's or the file's other one no longer counts.
        default_preset: The preset if nothing names one.
        config_of_weights: Returns the config for fine-tuning the model that "train.weights" names. Default: not used.

    Raises:
        UserError: For a key that does not exist or a value that cannot be; it names the key and where it stands.
    """
    in_file = {} if file is None else read_config_file(file)
    in_overrides = parse_overrides(overrides)
    named = preset or in_overrides.pop("preset", None) or in_file.get("preset")
    weights = _weights(options or {}, in_overrides, in_file)
    if named is None and weights and config_of_weights:
        base = config_of_weights(weights)
        named = base.preset
    else:
        named = named or default_preset
        if not isinstance(named, str):
            raise UserError(f"preset must be a name, not {named!r}; choose from {', '.join(presets.MODELS)}")
        base = presets.config(named)
    layers = [
        (f"config file {file}", {**in_file, "preset": named}),
        ("--set", in_overrides),
        ("options", _nested(options or {})),
    ]
    try:
        return base.merged(reduce(merge, [changes for _, changes in layers]))
    except UserError as error:
        # What is wrong only together is nobody's fault in particular; anything else is named by where it stands.
        for where, changes in layers:
            base.merged(changes, where)
        raise UserError(f"the settings together: {str(error).removeprefix('the config: ')}") from None


def _weights(options: Mapping[str, Any], in_overrides: Mapping[str, Any], in_file: Mapping[str, Any]) -> str | None:
    """The model to start from, where one is named; a bad value is told of when the layers are read."""
    sections = [in_overrides.get("train"), in_file.get("train")]
    named = [options.get("train.weights"), *(s.get("weights") for s in sections if isinstance(s, Mapping))]
    return next((value for value in named if value and isinstance(value, str)), None)


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    if options.get("train.epochs") is not None or options.get("train.minutes") is not None:
        nested["train"] = {"epochs": None, "minutes": None}
    for key, value in options.items():
        if value is not None:
            section, name = key.split(".")
            nested.setdefault(section, {})[name] = value
    return nested
