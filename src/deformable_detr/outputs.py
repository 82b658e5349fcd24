"""The files that a command writes: looked at before long work, then written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR
from typing import Any

from .errors import UserError
from .weights.files import is_stream, replace_file


def prepare_files(outputs: Mapping[str, Path | None]) -> None:
    """`prepare_file` for each option that was given; also `UserError` where two of them would write one file."""
    taken: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is not None and (other := taken.setdefault(path.resolve(), option)) != option:
            raise UserError(f"{option} {path}: {other} goes there too; name another file")
    for option, path in outputs.items():
        if path is not None:
            prepare_file(path, option)


def prepare_folder(folder: Path, option: str) -> Path:
    """The folder, made where missing. Raises UserError, naming the option, where nothing can be written there."""
    try:
        _try(folder)
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot write there: {error.strerror or error}") from None
    return folder


def prepare_file(path: Path, option: str) -> None:
    """Makes sure, before long work, that the file can be written afterwards. Raises UserError naming the option.

    Devices and pipes are written to as they are.
    """
    if is_stream(path):
        return
    try:
        with suppress(FileNotFoundError):
            if S_ISDIR(os.stat(path).st_mode):
                raise UserError(f"{option} {path}: is a folder, name a file")
        _try(Path(os.path.realpath(path)).parent)  # a link's file is replaced, not the link
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written: {error.strerror or error}") from None


def _try(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_text(path: Path, text: str) -> None:
    """The text as a file, its folder made where missing. Raises UserError where it cannot be written.

    What is no text in the name of a file is written as \\udc80.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def write_json(path: Path, value: Any) -> None:
    """`write_text` of the value as JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
