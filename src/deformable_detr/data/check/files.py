"""The files that a check writes: whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...weights.files import replace_file


def prepare(path: Path, option: str) -> None:
    """Makes the file's folder; `UserError`, naming the option, before long work where the file cannot be written."""
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder, name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path.with_name(f".{path.name}.probe"), "", option)
        path.with_name(f".{path.name}.probe").unlink()
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written: {error.strerror or error}") from None


def write_text(path: Path, text: str, option: str) -> None:
    """Puts the text into the file; `UserError`, naming the option that asked for it, where that cannot be done."""
    try:
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written: {error.strerror or error}") from None


def write_json(path: Path, value: Any, option: str) -> None:
    """`write_text` of the value as JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", option)
