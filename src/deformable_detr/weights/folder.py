"""Our own model folder: config.json beside model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..config import ModelConfig
from ..errors import UserError
from ..model.detector import DeformableDETR

FORMAT, VERSION = "deformable-detr", 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(model: DeformableDETR, folder: Path) -> None:
    """Writes both files, each whole or not at all. Raises UserError where the folder cannot be written."""
    from safetensors.torch import save_file

    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    described = {"format": FORMAT, "version": VERSION, "model": model.config.model_dump(mode="json")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
        text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
        replace_file(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise UserError(f"model folder {folder} cannot be written: {error.strerror or error}") from None


def load(folder: Path) -> DeformableDETR:
    """The model in evaluation mode. Raises UserError for a missing, foreign or broken folder."""
    config = read_config(folder)
    # The weights are all in the file: nothing to fetch, but what is frozen must stay as it was trained.
    pretrained = config.backbone_weights != "none"
    settled = config.replace(
        backbone_weights="none",
        backbone_norm="frozen" if config.backbone_norm == "auto" and pretrained else config.backbone_norm,
        frozen_stages=2 if config.frozen_stages is None and pretrained else config.frozen_stages,
    )
    model = DeformableDETR(settled)
    state = read_weights(folder / WEIGHTS)
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misfit = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    for what, names in (("lacks", missing), ("has the unknown", unknown), ("has another shape of", sorted(misfit))):
        if names:
            raise UserError(f"{folder / WEIGHTS} {what} {names[0]} (in all {len(names)}): it does not fit {CONFIG}")
    model.load_state_dict(state)
    return model.eval()


def read_config(folder: Path) -> ModelConfig:
    """The model's config from config.json."""
    path = folder / CONFIG
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"model {folder}: {path.name} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise UserError(f'{path} is not the config of a deformable-detr model (no "format": "{FORMAT}")')
    if described.get("version") != VERSION:
        raise UserError(f"{path} has version {described.get('version')!r}; this release reads {VERSION}")
    return ModelConfig.read(described.get("model") or {}, str(path))


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is broken or no safetensors file: {error}") from None


def replace_file(path: Path, write) -> None:
    """Lets `write` fill a temporary file beside `path`, then puts it in place: never half a file."""
    import os

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
