"""Prediction over files: what to read, what to write, and going on after a bad image."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..model.detector import DeformableDETR
from ..structures import Detections
from ..weights.folder import replace_file
from .predictor import folder_images


def find_images(sources: Sequence[Path]) -> list[Path]:
    """The image files named, and those directly inside the folders named, in order and each once.

    Raises UserError for a source that is not there and for a folder without images.
    """
    found: list[Path] = []
    for source in sources:
        if not source.exists():
            raise UserError(f"{source}: no such image or folder")
        found += folder_images(source) if source.is_dir() else [source]
    return list(dict.fromkeys(found))


def predict_files(
    model: DeformableDETR,
    images: Iterable[Path],
    out: Path | None = None,
    threshold: float = 0.5,
    json_file: Path | None = None,
    report: Callable[[str], None] = print,
    complain: Callable[[str], None] = print,
) -> int:
    """Finds objects in each image, draws them into the folder `out`, writes all as a list to `json_file`.

    A record of the list is what `Detections.to_dict` gives: {"image": path, "detections": [...], …}.

    An image that cannot be read or drawn is named through `complain` and left out; the others are done.
    `report` gets one line an image.

    Returns:
        The number of images that were left out.

    Raises:
        UserError: Before the first image, where an output cannot be written or a drawing would replace its image.
    """
    images = list(images)
    drawings = {} if out is None else _drawing_paths(images, prepare_folder(out, "--out"))
    if json_file is not None:
        prepare_file(json_file, "--json")
    records: list[dict[str, Any]] = []
    failures = 0
    for image in images:
        try:
            detections = model.predict(image, threshold=threshold)
            if out is not None:
                detections.save(drawings[image])
        except UserError as error:
            failures += 1
            complain(str(error))
            continue
        records.append(detections.to_dict())
        report(f"{image}: {_in_short(detections)}")
    if json_file is not None:
        write_json(json_file, records)
    return failures


def prepare_folder(folder: Path, option: str) -> Path:
    """The folder, made where missing. Raises UserError, naming the option, where nothing can be written there."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot write there: {error.strerror or error}") from None
    return folder


def prepare_file(path: Path, option: str) -> None:
    """Makes sure, before long work, that the file can be written afterwards. Raises UserError naming the option."""
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder, name a file")
    try:
        prepare_folder(path.parent, option)
    except UserError as error:
        raise UserError(str(error).replace(f"{option} {path.parent}:", f"{option} {path}:", 1)) from None


def write_json(path: Path, value: Any) -> None:
    """The value as JSON, the file whole or not at all. Raises UserError where it cannot be written."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def _in_short(detections: Detections, most: int = 5) -> str:
    """Such as "3 found: cat 0.98, cat 0.91, dog 0.55"; of many, the best."""
    if not len(detections):
        return "nothing found"
    best = zip(detections.names[:most], detections.scores.tolist()[:most], strict=True)
    listed = ", ".join(f"{name} {score:.2f}" for name, score in best)
    return f"{len(detections)} found: {listed}{', …' if len(detections) > most else ''}"


def _drawing_paths(images: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Where each image's drawing goes: its own name, numbered where two are called the same."""
    paths: dict[Path, Path] = {}
    taken: set[Path] = set()
    for image in images:
        suffix = ".jpg" if image.suffix.lower() in {".jpg", ".jpeg"} else ".png"
        path, number = out / f"{image.stem}{suffix}", 1
        while path in taken:
            number += 1
            path = out / f"{image.stem}-{number}{suffix}"
        if path.exists() and path.samefile(image):
            raise UserError(f"--out {out}: the drawing would replace the image {image}; name another folder")
        taken.add(path)
        paths[image] = path
    return paths
