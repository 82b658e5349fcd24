"""Convert a model to another format: the command `convert`."""

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
from .load import load_pretrained
from .model_card import ModelCardData, card_file

Format = Literal["native", "transformers", "official"]
_FILES = {
    "native": (native.CONFIG, native.WEIGHTS),
    "transformers": (transformers_format.CONFIG, PREPROCESSOR, transformers_format.WEIGHTS),
    "official": (official_format.FILE,),
}


def convert(source: str | os.PathLike[str], to: Format, out: str | os.PathLike[str]) -> list[str]:
    """Write a model into a folder in another format.

    Args:
        source: Anything that `load_pretrained` reads.
        to: "native" (for `from_pretrained`), "transformers" (model, image processor and class names for its Auto
            classes) or "official" (checkpoint.pth for the paper authors' code).
        out: The folder; it must not hold a model.

    Returns:
        Lines for the user: where the model is, how to load it, what the format cannot express.

    Raises:
        UserError: The source cannot be read, the format cannot express the model, or the folder cannot be written.
    """
    folder = Path(out)
    if to not in _FILES:
        raise UserError(f"--to {to}: choose from {', '.join(_FILES)}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; give a folder")
    existing = [name for names in _FILES.values() for name in names if (folder / name).exists()]
    if existing:
        raise UserError(f"--out {folder} already has {existing[0]}; choose another folder")
    model = load_pretrained(source)
    was_run = write(model, to, folder)
    return _notes(model, to, folder, was_run)


def write(model: DeformableDETRNetwork, to: Format, folder: Path, card_data: ModelCardData | None = None) -> bool:
    """Write a model and its card into a folder. Raises UserError as `convert` does.

    The files are read back before they are moved to the folder. A transformers model is also run beside this one.

    Returns:
        Whether it was run: False for the other formats, and if transformers is not installed.
    """
    card_data = card_data or ModelCardData(library="transformers" if to == "transformers" else "deformable-detr")
    if to == "native":
        native.save(model, folder, card_data)
        return False
    was_run = False
    with _staging(folder) as staging:
        if to == "transformers":
            transformers_format.save(model, staging)
            verify.check_round_trip(model, transformers_format.read(staging))
            was_run = verify.check_in_transformers(model, staging)
        else:
            official_format.save(model, staging)
            verify.check_round_trip(model, official_format.read(staging / official_format.FILE))
    write_files(folder, card_file(folder, model.config, card_data))
    return was_run


def portability_note(config: ModelConfig) -> str | None:
    """Return a warning for a network that cannot be converted to transformers, or None."""
    try:
        transformers_format.check_parts(config)
    except UserError:
        return "note: this network cannot be converted to transformers; one trained with --preset small-portable can"
    return None


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` at the end of the block, or vanish if it raises."""
    existed = folder.is_dir()
    staging: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".convert-", dir=folder))
        yield staging
        for file in sorted(staging.iterdir(), reverse=True):  # the weights before config.json
            os.replace(file, folder / file.name)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be written: {error.strerror or error}") from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _notes(model: DeformableDETRNetwork, to: Format, folder: Path, was_run: bool) -> list[str]:
    if to == "native":
        return [f"wrote {folder}: load it with DeformableDETR.from_pretrained({str(folder)!r})"]
    if to == "transformers":
        lines = [
            f"wrote {folder}: load it with AutoModelForObjectDetection.from_pretrained({str(folder)!r})",
            "verified: transformers computes the same logits and boxes"
            if was_run
            else "the files were read back; the model was not run in transformers, which is not installed",
        ]
    else:
        path = folder / official_format.FILE
        lines = [f"wrote {path}: load it with main.py --resume {path}"]
        if (count := model.config.num_classes) != 91:
            lines.append(f"note: build() of the official code assumes 91 classes; set num_classes = {count} there")
    if (divisor := model.config.size_divisor) != 1:
        lines.append(
            f"note: this model was trained on images with sides that are multiples of {divisor}; other tools keep "
            "other sizes, which costs AP: resize images beforehand"
        )
    return lines
