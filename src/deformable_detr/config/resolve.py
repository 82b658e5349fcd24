"""From a preset, a file, `--set` and options to one validated config; later sources override earlier ones."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from ..utils.errors import UserError
from ..utils.yaml_loader import load_yaml, read_yaml
from . import presets
from .schema import Config
from .section import merge

DEFAULT_PRESET = "small"


def resolve_config(
    preset: str | None = None,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    config_of_weights: Callable[[str, Mapping[str, Any]], Config] | None = None,
) -> Config:
    """Merge all sources of settings.

    Args:
        preset: Name of the preset to start from. Default: the preset of `overrides` or `file`, else the config of the
            model that "train.weights" names, else `DEFAULT_PRESET`.
        file: YAML file with any keys of a `Config`.
        overrides: `section.key=value` strings; values are read as YAML.
        options: Values by dotted key, for example {"train.epochs": 3}; None: not set. Setting only one of
            "train.epochs" and "train.minutes" clears the other.
        config_of_weights: Returns the config for fine-tuning the model that "train.weights" names, given the changes of
            the section "model".

    Raises:
        UserError: A key is unknown or a value is invalid; the message names the key and its source.
    """
    sources = {
        f"config file {file}": {} if file is None else read_config_file(file),
        "--set": parse_overrides(overrides),
        "options": _nested(options or {}),
    }
    changes = reduce(merge, sources.values())
    name = preset or changes.get("preset")
    train = changes.get("train")
    weights = train.get("weights") if isinstance(train, Mapping) else None
    if name is None and isinstance(weights, str) and config_of_weights:
        model = changes.get("model")
        base = config_of_weights(weights, model if isinstance(model, Mapping) else {})
        name = base.preset
    else:
        name = name or DEFAULT_PRESET
        if not isinstance(name, str):
            raise UserError(f"preset must be a name, not {name!r}; choose from {', '.join(presets.PRESETS)}")
        model = changes.get("model")
        is_adapter = isinstance(model, Mapping) and "family" in model  # the file has all of it; no preset does
        base = Config(preset=name) if is_adapter else presets.config(name)
    try:
        return base.updated({**changes, "preset": name})
    except UserError as error:
        for source, changes in sources.items():  # name the source whose values are invalid by themselves
            base.updated(changes, source)
        raise UserError(f"combined settings: {str(error).removeprefix('config: ')}") from None


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Read the nested keys of a YAML file. Raises UserError if it is missing or not a YAML mapping."""
    try:
        values = read_yaml(Path(path))
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"config file {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"config file {path} must contain keys such as 'train:' and 'model:'")
    return values or {}


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Parse `section.key=value` strings, with values in YAML. Raises UserError if one has no key or is not valid."""
    nested: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"--set {override}: expected KEY=VALUE, for example --set train.lr=1e-4")
        try:
            value = load_yaml(text)
        except ValueError:
            raise UserError(f"--set {override}: the value is not valid YAML") from None
        *sections, name = key.split(".")
        parent = nested
        for section in sections:
            parent = parent.setdefault(section, {})
            if not isinstance(parent, dict):
                raise UserError(f"--set {override}: '{section}' already has a value")
        parent[name] = value
    return nested


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    if options.get("train.epochs") is not None or options.get("train.minutes") is not None:
        nested["train"] = {"epochs": None, "minutes": None}
    for key, value in options.items():
        if value is not None:
            section, name = key.split(".")
            nested.setdefault(section, {})[name] = value
    return nested
