"""A model in one format written in another: the verb `convert`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from ..config.schema import ModelConfig
from ..model.network import DeformableDETRNetwork
from ..utils.errors import UserError
from ..utils.files import write_files
from . import native, official_format, transformers_format, verify
from .image_processor import PREPROCESSOR
from .load import load
from .model_card import ModelCardData, card_writer

Format = Literal["ours", "transformers", "official"]
_FILES = {
    "ours": (native.CONFIG, native.WEIGHTS),
    "transformers": (transformers_format.CONFIG, PREPROCESSOR, "model.safetensors"),
    "official": (official_format.FILE,),
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
    tried = write(model, to, target)
    return notes(model, to, target, tried)


def write(model: DeformableDETRNetwork, to: Format, target: Path, facts: ModelCardData | None = None) -> bool:
    """Writes a model into a folder in a format, with a model card. Raises UserError as `convert` does.

    What is written is read back, and for transformers run there beside the model, before it is put in place. Returns
    whether it was run: False where transformers is not installed or the format is another one.
    """
    facts = facts or ModelCardData(library="transformers" if to == "transformers" else "deformable-detr")
    if to == "ours":
        native.save(model, target, facts)
        return False
    tried = False
    with _staged(target) as made:
        if to == "transformers":
            transformers_format.save(model, made)
            verify.same_when_read(model, transformers_format.load(made)[1], made / "model.safetensors")
            tried = verify.same_in_transformers(model, made)
        else:
            official_format.save(model, made)
            verify.same_when_read(
                model, official_format.load(made / official_format.FILE)[1], made / official_format.FILE
            )
    write_files(target, card_writer(target, model.config, facts))
    return tried


def not_convertible(config: ModelConfig) -> str | None:
    """One line for whoever is about to train a network that transformers has no place for; none for the others."""
    try:
        transformers_format.check_parts(config)
    except UserError:
        return "note: transformers has no place for this network; --preset small-portable can be converted to it"
    return None


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder whose files move into `target` at the end of the block, or vanish where it raises."""
    there = target.is_dir()
    made: Path | None = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".convert-", dir=target))
        yield made
        for file in sorted(made.iterdir(), reverse=True):  # weights before the config that makes them a model
            os.replace(file, target / file.name)
    except OSError as error:
        raise UserError(f"folder {target} cannot be written: {error.strerror or error}") from None
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        if not there and target.is_dir() and not any(target.iterdir()):
            target.rmdir()


def notes(model: DeformableDETRNetwork, to: Format, target: Path, tried: bool) -> list[str]:
    """Lines for the user: where the model is, how to load it, and what the format has no place for."""
    if to == "ours":
        return [f"the model is in {target}: DeformableDETR.from_pretrained({str(target)!r})"]
    multiple = model.config.size_divisor
    sizes = [] if multiple == 1 else [
        f"note: it was trained on images whose sides are multiples of {multiple}; what prepares images there "
        "keeps other sizes, which costs AP: resize them to such sides beforehand"
    ]  # fmt: skip
    if to == "transformers":
        how = (
            "it gives the same logits and boxes in transformers as here"
            if tried
            else "read back and equal; not run in transformers, which is not installed"
        )
        return [f"the model is in {target}: AutoModelForObjectDetection.from_pretrained({str(target)!r})", how, *sizes]
    lines = [
        f"the model is in {target / official_format.FILE}: main.py --resume {target / official_format.FILE}",
        *sizes,
    ]
    if model.config.num_classes != 91:
        lines.append(
            f"note: build() of the official code counts on 91 classes for COCO; set num_classes = "
            f"{model.config.num_classes} there"
        )
    return lines
