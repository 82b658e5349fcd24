"""Folders and files on disk and in object stores, by paths and URLs that fsspec knows."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..data.discovery import is_hidden
from ..utils.errors import UserError
from ..utils.files import replace_file


def resolve(url: str) -> tuple[Any, str]:
    """The file system of a path or URL (s3://, gs://, memory://, file://, …) and the path in it; local ones absolute.

    Raises UserError for an unknown protocol and for one whose package is not installed.
    """
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    if "::" in url and os.path.exists(url):  # what fsspec would take for a chain of protocols
        return LocalFileSystem(), os.path.abspath(url)
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {one_line(error)}") from None


def is_local(system: Any) -> bool:
    """Whether a file system is this machine's."""
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(system, LocalFileSystem)


def url_of(system: Any, path: str) -> str:
    """What `resolve` takes: a plain path where it is local."""
    return path if is_local(system) else system.unstrip_protocol(path)


def walk(system: Any, folder: str, skip: str | None = None) -> Iterator[tuple[str, int]]:
    """Paths and sizes in bytes of all files in a folder and below, by name, a folder's files before its folders.

    Hidden files and folders (names with a dot in front) are left out, and the folder `skip`. Links to files are
    followed, links to folders are not: they may lead round in circles. Keeps one folder's names in memory.
    """
    folders = []
    for name, path, size in sorted(_scan_local(folder) if is_local(system) else _scan(system, folder)):
        if is_hidden(name) or (size is None and skip is not None and same(system, path, skip)):
            continue
        if size is None:
            folders.append(path)
        else:
            yield path, size
    for path in folders:
        yield from walk(system, path, skip)


def same(system: Any, one: str, other: str) -> bool:
    """Whether two paths are one folder, however they are spelled."""
    return os.path.realpath(one) == os.path.realpath(other) if is_local(system) else one == other


Entry = tuple[str, str, int | None]  # name, path, size; folders have none


def _scan_local(folder: str) -> Iterator[Entry]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield entry.name, entry.path, None
            elif not entry.is_dir():
                try:
                    size = entry.stat().st_size
                except OSError:  # a link to nowhere: whoever reads it says so
                    size = 0
                yield entry.name, entry.path, size


def _scan(system: Any, folder: str) -> Iterator[Entry]:
    for entry in system.ls(folder, detail=True):
        path = entry["name"].rstrip("/")
        if path != folder.rstrip("/"):  # stores may list the folder's own marker
            size = None if entry["type"] == "directory" else entry.get("size") or 0
            yield path.rsplit("/", 1)[-1], path, size


class Store:
    """The folder that results go to. Files get their names whole or not at all."""

    def __init__(self, url: str) -> None:
        self.system, self.root = resolve(url)
        self.root = self.root.rstrip("/") or "/"
        self.local = is_local(self.system)

    def path(self, name: str) -> str:
        """Of a file in the folder, for the file system."""
        return f"{self.root}/{name}"

    def open(self, name: str) -> Any:
        """The file, to be read."""
        return self.system.open(self.path(name), "rb")

    def names(self) -> list[str]:
        """Of the files in it, sorted, hidden ones too; none where there is no such folder."""
        if not self.system.exists(self.root):
            return []
        self.system.invalidate_cache(self.root)
        entries = _scan_local(self.root) if self.local else _scan(self.system, self.root)
        return sorted(name for name, _, size in entries if size is not None)

    def put(self, name: str, write: Callable[[Path], object]) -> None:
        """Lets `write` fill a temporary file, then puts it in place; stores show an upload when it is complete."""
        if self.local:
            replace_file(Path(self.path(name)), write)
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            write(path)
            self.system.put_file(str(path), self.path(name))

    def remove(self, name: str) -> None:
        """The file is gone afterwards."""
        self.system.rm_file(self.path(name))


def one_line(error: BaseException) -> str:
    """What an exception says, in a line of moderate length."""
    return " ".join(str(error).split())[:300] or type(error).__name__
