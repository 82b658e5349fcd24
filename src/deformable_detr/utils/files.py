"""Files: read with clear errors, written whole or not at all, checksums."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR
from typing import Any

from .errors import UserError, first_line

_MOST_JSON = 100 * 2**20  # bytes; the index of a model in a thousand shards has a few millions


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises UserError where it is missing or holds anything else."""
    try:
        if path.stat().st_size > _MOST_JSON:
            raise UserError(f"{path} has {path.stat().st_size >> 20} MiB: no config or index is as large")
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object")
    return values


def write_files(folder: Path, files: Mapping[str, Callable[[Path], object]]) -> None:
    """Writes each file of a folder by its function, whole or not at all. Raises UserError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in files.items():
            replace_file(folder / name, write)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be written: {error.strerror or error}") from None
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # what it raises for a full disk
            raise
        raise UserError(f"folder {folder} cannot be written: {first_line(error)}") from None


def temporary_file(path: Path) -> Path:
    """A hidden name beside `path`, this process's own, and no longer than names may be."""
    name = path.name if len(os.fsencode(path.name)) <= 200 else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    return path.with_name(f".{name}.{os.getpid()}.tmp")


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_changed(path: Path, expected: str) -> None:
    """Raises UserError where a checkpoint's file cannot be read, or its SHA-256 is not the expected one."""
    try:
        found = checksum(path)
    except OSError as error:
        raise UserError(f"checkpoint file {path} cannot be read: {error.strerror or error}") from None
    if found != expected:
        raise UserError(f"checkpoint file {path} is damaged (its checksum is wrong)")


def is_stream(path: Path) -> bool:
    """Whether it is there and no regular file nor folder, or this process's own input or output."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    own = str(path).startswith(("/dev/fd/", "/dev/std", "/proc/"))
    return own or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, then puts it in place: never half a file.

    A link stays one: what it names is replaced. A device or a pipe stays too and is written to.
    """
    if is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            write(whole := Path(folder, path.name))
            with open(path, "ab") as stream:
                stream.write(whole.read_bytes())
        return
    path = Path(os.path.realpath(path))
    temporary = temporary_file(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask gives; safetensors would make it private
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def json_text(values: Mapping[str, Any]) -> Callable[[Path], object]:
    """A writer of `values` as JSON, for `write_files`."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


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


SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}


def is_exported(source: str | os.PathLike[str]) -> bool:
    """Whether a path ends as exported models do: .onnx, .xml or .pt2."""
    return Path(source).suffix in SUFFIXES.values()


def replace_text(path: Path, text: str) -> None:
    """Replaces the file at once by one with this text, flushed to the disk."""
    replace_file(path, lambda temporary: temporary.write_bytes(text.encode()))  # the same bytes on all systems
