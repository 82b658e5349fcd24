"""Read and write files: atomic replacement, early checks of output paths, checksums."""

import errno
import filecmp
import hashlib
import io
import json
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from .errors import UserError, first_line

EXPORT_SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}

_MAX_JSON_BYTES = 100 * 2**20  # the index of a model in a thousand shards has a few MB

FileContent = str | Callable[[Path], object]


def is_exported(source: str | os.PathLike[str]) -> bool:
    """Return whether a path has the suffix of an exported model: .onnx, .xml or .pt2."""
    return Path(source).suffix in EXPORT_SUFFIXES.values()


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a file for reading. Raises OSError if it is a pipe or a device, which could block or never end."""

    def open_at_once(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for its writer

    file = open(path, "rb", opener=open_at_once)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return file


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """Return the content of a file. Raises OSError as `open_regular` does."""
    with open_regular(path) as file:
        return file.read()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises UserError if it is missing, larger than 100 MiB, or holds no object."""
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > _MAX_JSON_BYTES:
                raise UserError(f"{path} has {size >> 20} MiB, too many for a config or an index")
            values = json.loads(file.read().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return values


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, content: FileContent) -> None:
    """Replace a file atomically by a text, or by what a function writes at the temporary path that it is given.

    A symbolic link stays and its target is replaced. Devices and pipes are written to. Raises OSError if this fails;
    the old file is then unchanged.
    """
    if is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, path.name)
            _write(temporary, content)
            with open(path, "ab") as stream:
                stream.write(temporary.read_bytes())
        return
    path = Path(os.path.realpath(path))
    temporary = temporary_path(path)
    try:
        _stage(temporary, content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_files(folder: Path, files: Mapping[str, FileContent | None]) -> None:
    """Write files in a folder, or remove those of content None; create the folder if needed.

    If a file cannot be written, all stay as they were. Where a config.json changes, or a file that it goes with, it is
    missing until the others are in place: an interruption leaves no model that is half of another one.

    Raises:
        UserError: A file cannot be written.
    """
    path = folder / next(iter(files), "")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if len(files) == 1 and (content := files[path.name]) is not None:
            return replace_file(path, content)
        with ExitStack() as stack:
            moves: dict[Path, Path] = {}
            for name, content in files.items():
                path = Path(os.path.realpath(folder / name))
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                if content is not None:
                    stack.callback(temporary_path(path).unlink, missing_ok=True)
                    _stage(temporary_path(path), content)
                    moves[path] = temporary_path(path)
            _put_in_place(folder, files, moves)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def _put_in_place(folder: Path, files: Mapping[str, FileContent | None], moves: Mapping[Path, Path]) -> None:
    """Move staged files to their paths, config.json last, and remove the files without content."""
    config = Path(os.path.realpath(folder / "config.json"))
    texts = [(path, temporary) for path, temporary in moves.items() if path.suffix == ".json"]
    removed = [folder / name for name, content in files.items() if content is None]
    same = all(path.is_file() and filecmp.cmp(path, temporary, shallow=False) for path, temporary in texts)
    if config in moves and (not same or any(path.exists() for path in removed)):
        config.unlink(missing_ok=True)
    for path in removed:
        path.unlink(missing_ok=True)
    for path in sorted(moves, key=config.__eq__):
        os.replace(moves[path], path)


def write_text(path: Path, text: str) -> None:
    """Write one text file, as `write_files` does."""
    write_files(path.parent, {path.name: text})


def write_json(path: Path, value: Any) -> None:
    """Write one JSON file, as `write_files` does."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return a value as indented JSON. Raises ValueError for NaN and infinity."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def prepare_files(outputs: Mapping[str, Path | None]) -> None:
    """Create the folders of each option's output file, if given, and check before long work that it can be written.

    Raises UserError if a file cannot be written, or two options name the same file.
    """
    options: dict[Path, str] = {}
    paths = {option: path for option, path in outputs.items() if path is not None}
    for option, path in paths.items():
        if (other := options.setdefault(path.resolve(), option)) != option:
            raise UserError(f"{option} {path}: {other} writes the same file; choose another path")
    for option, path in paths.items():
        if is_stream(path):
            continue
        try:
            with suppress(FileNotFoundError):
                if stat.S_ISDIR(os.stat(path).st_mode):
                    raise UserError(f"{option} {path}: is a folder; name a file")
            _create_writable(Path(os.path.realpath(path)).parent)  # `replace_file` replaces the target of a link
        except OSError as error:
            raise UserError(f"{option} {path}: cannot be written: {error.strerror or error}") from None


def prepare_folder(folder: Path, option: str) -> Path:
    """Create an output folder and check that it is writable. Raises UserError, naming the option, if it is not."""
    try:
        _create_writable(folder)
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot write there: {error.strerror or error}") from None
    return folder


def temporary_path(path: Path) -> Path:
    """Return the path of a hidden temporary file beside `path` that no other process uses."""
    return path.with_name(f".{path.name[:60]}.{os.getpid()}.tmp")


def is_stream(path: Path) -> bool:
    """Return whether a path is a device, a pipe, or an open file of this process such as /dev/stdout."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return str(path).startswith(("/dev/fd/", "/dev/std", "/proc/")) or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _stage(temporary: Path, content: FileContent) -> None:
    """Write a file to the disk, with the permissions of a new one."""
    temporary.touch()
    mode = temporary.stat().st_mode  # follows the umask; safetensors would make the file private
    _write(temporary, content)
    temporary.chmod(mode)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())


def _write(path: Path, content: FileContent) -> None:
    if isinstance(content, str):
        path.write_bytes(content.encode("utf-8", errors="backslashreplace"))  # file names can hold undecodable bytes
        return
    try:
        content(path)
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # raised by safetensors if the disk is full
            raise
        raise OSError(errno.EIO, first_line(error)) from None


def _create_writable(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
