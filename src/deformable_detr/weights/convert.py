"""Convert a model to another format: the command `convert`."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from ..config.detector import DetectorConfig
from ..config.schema import ModelConfig
from ..model.network import DeformableDETRNetwork
from ..utils.errors import UserError
from ..utils.files import FileContent, write_files
from ..utils.progress import stage_bar
from . import native, official_format, transformers_format, verify
from .checkpoint import STATED, SUPPORTED, check_supported
from .image_processor import PREPROCESSOR, PROCESSOR
from .load import load_pretrained, read_checkpoint
from .model_card import ModelCardData, card_file

Format = Literal["native", "transformers", "official"]
_FILES = (native.CONFIG, native.WEIGHTS, PREPROCESSOR, official_format.FILE)


def convert(
    source: str | os.PathLike[str],
    to: Format,
    out: str | os.PathLike[str],
    stated: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> list[str]:
    """Write a model into a folder in another format.

    Args:
        source: Anything that `load_pretrained` reads.
        to: "native" (for `from_pretrained`), "transformers" (model, image processor and class names for its Auto
            classes) or "official" (checkpoint.pth for the paper authors' code).
        out: The folder; it must not hold a model.
        stated: Fields of `ModelConfig` that a `.pth` without settings does not tell, such as "num_heads".
        progress: Show the current step while it runs.

    Returns:
        Lines for the user: where the model is, how to load it, what the format cannot express.

    Raises:
        UserError: The source cannot be read, the format cannot express the model, or the folder cannot be written.
    """
    folder = Path(out)
    if to not in get_args(Format):
        raise UserError(f"--to {to}: choose from {', '.join(get_args(Format))}")
    if existing := [name for name in _FILES if (folder / name).exists()]:
        raise UserError(f"--out {folder} already has {existing[0]}; choose another folder")
    if unknown := [name for name in stated or {} if name not in STATED]:
        raise UserError(f"--set model.{unknown[0]}: convert only takes {', '.join(STATED)}, where a .pth lacks them")
    with stage_bar("convert", 2, progress) as bar:
        bar.stage("read the model")
        model = load_pretrained(source, **(stated or {}))
        bar.stage("write the files and verify them")
        return [*read_checkpoint(source, stated).notes, *write(model, to, folder)]


def write(model: DeformableDETRNetwork, to: Format, folder: Path, card_data: ModelCardData | None = None) -> list[str]:
    """Write a model and its card into a folder. Returns and raises what `convert` does.

    The files are read back before they are copied to the folder. A transformers model is also run beside this one.
    """
    card_data = card_data or ModelCardData(library="transformers" if to == "transformers" else "deformable-detr")
    if to == "native":
        native.save(model, folder, card_data)
        return [f"wrote {folder}: load it with DeformableDETR.from_pretrained({str(folder)!r})"]
    with tempfile.TemporaryDirectory() as temporary:
        staging = Path(temporary)
        if to == "transformers":
            transformers_format.save(model, staging)
            verify.check_round_trip(model, transformers_format.read(staging))
            notes = [f"wrote {folder}: load it with AutoModelForObjectDetection.from_pretrained({str(folder)!r})"]
            if verify.check_in_transformers(model, staging):
                notes.append("verified: transformers computes the same logits and boxes")
            else:
                notes.append("the files were read back, but the model was not run: transformers is not installed")
        else:
            path, count = folder / official_format.FILE, model.config.num_classes
            official_format.save(model, staging)
            verify.check_round_trip(model, official_format.read(staging / path.name))
            notes = [f"wrote {path}: load it with main.py --resume {path}"]
            if count != 91:
                notes.append(f"note: build() of the official code assumes 91 classes; set num_classes = {count} there")
        files: dict[str, FileContent | None] = {PROCESSOR: None} if to == "transformers" else {}
        files |= {file.name: partial(shutil.copyfile, file) for file in staging.iterdir()}
        write_files(folder, files | card_file(folder, model.config, card_data))
    if (divisor := model.config.size_divisor) != 1:
        notes.append(f"note: resize images to multiples of {divisor} beforehand, as in training; other sizes cost AP")
    return notes


def portability_note(config: DetectorConfig) -> str | None:
    """Return a warning for a network that cannot be converted to transformers, or None."""
    if not isinstance(config, ModelConfig):
        return None
    try:
        check_supported(config, SUPPORTED, "transformers", "small-portable")
    except UserError:
        masks = ", without masks," if config.masks else ""
        portable = f"one trained with --preset small-portable{masks} can"
        return f"note: this network cannot be converted to transformers; {portable}"
    return None
