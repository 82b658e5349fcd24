"""Our own model folder: config.json beside model.safetensors, and a README.md that says what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..config.schema import ModelConfig
from ..model.network import DeformableDETRNetwork, N
from ..utils.errors import UserError
from ..utils.files import json_text, read_json, replace_file, write_files
from .files import read_safetensors
from .key_mapping import check_sizes
from .model_card import ModelCardData, card_writer

__all__ = ["CONFIG", "FORMAT", "VERSION", "WEIGHTS", "read", "read_config", "replace_file", "save"]

FORMAT, VERSION = "deformable-detr", 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(model: DeformableDETRNetwork, folder: Path, facts: ModelCardData | None = None) -> None:
    """Writes the files, each whole or not at all. Raises UserError where the folder cannot be written.

    facts: what the model card should tell beyond what the model itself knows.
    """
    from safetensors.torch import save_file

    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    described = {"format": FORMAT, "version": VERSION, "model": model.config.model_dump(mode="json")}
    write_files(
        folder,
        {
            WEIGHTS: lambda path: save_file(state, path, metadata={"format": "pt"}),
            **card_writer(folder, model.config, facts or ModelCardData()),
            CONFIG: json_text(described),
        },
    )


def read(folder: Path, network_class: type[N] = DeformableDETRNetwork) -> tuple[ModelConfig, dict[str, Tensor], N]:
    """The config, the tensors and a model in their shape that does not hold them yet.

    Raises UserError for a missing, foreign or broken folder.
    """
    config = read_config(folder).without_pretrained_backbone()
    state, _ = read_safetensors(folder / WEIGHTS)
    check_sizes(config, state, folder / CONFIG)
    model = network_class(config)
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misfit = sorted(
        name
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape or own[name].is_floating_point() != state[name].is_floating_point()
    )
    for what, names in (("lacks", missing), ("has the unknown", unknown), ("has another shape or type of", misfit)):
        if names:
            raise UserError(f"{folder / WEIGHTS} {what} {names[0]} (in all {len(names)}): it does not fit {CONFIG}")
    return config, state, model


def read_config(folder: Path) -> ModelConfig:
    """The model's config from config.json."""
    path = folder / CONFIG
    described: dict[str, Any] = read_json(path)
    if described.get("format") != FORMAT:
        raise UserError(f'{path} is not the config of a deformable-detr model (no "format": "{FORMAT}")')
    if described.get("version") != VERSION:
        raise UserError(f"{path} has version {described.get('version')!r}; this release reads {VERSION}")
    values = described.get("model")
    if not isinstance(values, dict):
        raise UserError(f"{path} has no model section")
    return ModelConfig.from_dict(values, str(path))
