"""A model in one format written in another: the verb `convert`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from ..errors import UserError
from ..model.detector import DeformableDETR
from . import folder, official, repository
from .card import Facts, card_writer
from .files import write_files
from .image_processor import PREPROCESSOR
from .source import load

Format = Literal["ours", "transformers", "official"]
_FILES = {
    "ours": (folder.CONFIG, folder.WEIGHTS),
    "transformers": (repository.CONFIG, PREPROCESSOR, "model.safetensors"),
    "official": (official.FILE,),
}


def convert(source: str | os.PathLike[str], to: Format, out: str | os.PathLike[str]) -> list[str]:
    """Writes the model of any source into the folder `out`, in another format; returns what a user should know.

    to: "ours" (for `from_pretrained`), "transformers" (model, image processor and class names for its Auto classes),
        "official" (checkpoint.pth for the paper authors' code).

    Raises UserError for a source that cannot be read (see `source.load`), for a model that the format has no place
    for, and for a folder that already holds a model or cannot be written.
    """
    target = Path(out)
    if to not in _FILES:
        raise UserError(f"--to {to}: choose from {', '.join(_FILES)}")
    if target.exists() and not target.is_dir():
        raise UserError(f"--out {target} is a file; it must be a folder")
    taken = [name for names in _FILES.values() for name in names if (target / name).exists()]
    if taken:
        raise UserError(f"--out {target} already holds {taken[0]}: choose another folder")
    model = load(source)
    write(model, to, target)
    return notes(model, to, target)


def write(model: DeformableDETR, to: Format, target: Path, facts: Facts | None = None) -> None:
    """Writes a model into a folder in a format, with a model card. Raises UserError as `convert` does."""
    facts = facts or Facts(library="transformers" if to == "transformers" else "deformable-detr")
    if to == "ours":
        folder.save(model, target, facts)
        return
    if to == "transformers":
        repository.save(model, target)
    else:
        official.save(model, target)
    write_files(target, card_writer(target, model.config, facts))


def notes(model: DeformableDETR, to: Format, target: Path) -> list[str]:
    """Lines for the user: where the model is, how to load it, and what the format has no place for."""
    if to == "ours":
        return [f"the model is in {target}: DeformableDETR.from_pretrained({str(target)!r})"]
    if to == "transformers":
        return [f"the model is in {target}: AutoModelForObjectDetection.from_pretrained({str(target)!r})"]
    lines = [f"the model is in {target / official.FILE}: main.py --resume {target / official.FILE}"]
    if model.config.num_classes != 91:
        lines.append(
            f"note: build() of the official code counts on 91 classes for COCO; set num_classes = "
            f"{model.config.num_classes} there"
        )
    return lines
