"""Folders and files on disk and in object stores, by the paths and URLs that fsspec accepts."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..data.discovery import is_hidden
from ..utils.errors import UserError, first_line
from ..utils.files import replace_file


def resolve_url(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a path or URL (s3://, gs://, file://, …) and the path in it.

    Raises:
        UserError: The protocol is unknown or its package is not installed.
    """
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    if "::" in url and os.path.exists(url):  # not a chain of protocols
        return LocalFileSystem(), os.path.abspath(url)
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {first_line(error)}") from None


def is_local(system: Any) -> bool:
    """Return whether a file system is this machine's."""
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(system, LocalFileSystem)


def to_url(system: Any, path: str) -> str:
    """Return what `resolve_url` accepts: a plain path if it is local."""
    return path if is_local(system) else system.unstrip_protocol(path)


def walk_files(system: Any, folder: str) -> Iterator[tuple[str, int]]:
    """Yield path and size in bytes of all files below a folder, sorted, a folder's files before its subfolders.

    Hidden files and folders are left out. Symbolic links to folders, which may be cyclic, are not followed.
    """
    folders = []
    for entry in sorted(system.ls(folder, detail=True), key=lambda entry: entry["name"]):
        path = entry["name"].rstrip("/")
        if path == folder or is_hidden(path.rpartition("/")[2]):  # some stores list a marker for the folder itself
            continue
        if entry["type"] == "directory":
            folders.append(path)
        else:
            yield path, entry.get("size") or 0
    for path in folders:
        yield from walk_files(system, path)


class OutputFolder:
    """The folder of the results, local or in an object store. Files appear complete or not at all.

    Attributes:
        system: fsspec file system.
        root: Path in it.
        url: Path if it is local, else URL.
        local: Whether it is on this machine.
    """

    def __init__(self, url: str) -> None:
        self.system, root = resolve_url(url)
        self.root = root.rstrip("/") or "/"
        self.url = to_url(self.system, self.root)
        self.local = is_local(self.system)

    def path(self, name: str) -> str:
        """Return the path of a file in the file system."""
        return f"{self.root}/{name}"

    def open(self, name: str) -> Any:
        """Open a file for reading."""
        return self.system.open(self.path(name), "rb")

    def list_files(self) -> list[str]:
        """Return the sorted names of the files, including hidden ones; empty if the folder does not exist."""
        self.system.invalidate_cache(self.root)
        try:
            entries = self.system.ls(self.root, detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rpartition("/")[2] for entry in entries if entry["type"] != "directory")

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Let `write` fill a temporary file, then rename or upload it."""
        if self.local:
            replace_file(Path(self.path(name)), write)
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            write(path)
            self.system.put_file(str(path), self.path(name))

    def delete(self, name: str) -> None:
        """Delete a file."""
        self.system.rm_file(self.path(name))
