"""The package's own model folder: config.json, model.safetensors and a README.md that describes them."""

from pathlib import Path
from typing import Any

from ..config.schema import ModelConfig
from ..model.network import DeformableDETRNetwork
from ..utils.errors import UserError
from ..utils.files import json_text, read_json, write_files
from .checkpoint import Checkpoint
from .files import read_safetensors
from .model_card import ModelCardData, card_file

FORMAT, VERSION = "deformable-detr", 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(model: DeformableDETRNetwork, folder: Path, card_data: ModelCardData | None = None) -> None:
    """Write the folder, each file atomically. Raises UserError if it cannot be written."""
    from safetensors.torch import save_file

    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    values = {"format": FORMAT, "version": VERSION, "model": model.config.model_dump(mode="json")}
    write_files(
        folder,
        {
            WEIGHTS: lambda path: save_file(state, path, metadata={"format": "pt"}),
            **card_file(folder, model.config, card_data or ModelCardData()),
            CONFIG: json_text(values),
        },
    )


def read(folder: Path) -> Checkpoint:
    """Read the folder. Raises UserError if a file is missing, foreign or damaged."""
    path = folder / CONFIG
    values = read_json(path)
    if values.get("version") != VERSION:
        raise UserError(f"{path} has version {values.get('version')!r}; this release reads version {VERSION}")
    saved: Any = values.get("model")
    config = ModelConfig.from_dict(saved, f"{path}: model").without_pretrained_backbone()
    tensors, _ = read_safetensors(folder / WEIGHTS)
    return Checkpoint(config, tensors, folder / WEIGHTS, CONFIG)
