"""What there is to read: folders of images, Parquet files with image bytes, WebDataset shards."""

from __future__ import annotations

import itertools
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import PurePosixPath
from tarfile import EOFHeaderError, HeaderError, ReadError  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any, NamedTuple

from torch import Tensor

from ..data.discovery import IMAGE_SUFFIXES, is_hidden, is_image
from ..utils.errors import UserError
from ..utils.images import decode_image, read_image
from .filesystem import is_local, one_line, resolve, same, url_of, walk

KINDS: dict[str, tuple[str, ...]] = {
    "images": tuple(sorted(IMAGE_SUFFIXES)),
    "parquet": (".parquet", ".pq"),
    "webdataset": (".tar", ".tar.gz", ".tgz"),
}
PIECE = 256  # records of a shard that are read as one piece, at least
PARTS = 8  # pieces of a Parquet row group, at most: the rows before a piece are read again to get to it
LARGEST = 512 * 2**20  # bytes of one image in a shard
READ_TRIES = 3


class Columns(NamedTuple):
    """Of Parquet: where the image bytes are, where a name for the row; none: found by type, row numbers only."""

    image: str | None = None
    id: str | None = None


class Piece(NamedTuple):
    """A part of a file: an image file as a whole, or `count` records of a shard from `start` on (−1: to the end)."""

    file: str
    start: int
    count: int
    size: int  # bytes of the file


class Record(NamedTuple):
    """One image to be: where it is, its name in its shard, and how to read it (raises UserError) or what is wrong.

    image: a path or URL; in a shard followed by "#" and the member's name or the row's number, counted from 0.
    """

    image: str
    key: str | None
    load: Callable[[], Tensor] | None
    error: str | None = None


def find_pieces(
    sources: Sequence[str], form: str = "auto", columns: Columns | None = None, skip: str | None = None
) -> tuple[str, Iterator[Piece]]:
    """The kind of the sources and their pieces, always in the same order.

    sources: folders (searched to the bottom), files and patterns with *, paths or URLs. form: a key of `KINDS`, or
    auto: the one kind that is there. skip: a folder not to look into.
    Raises UserError, at once or on the way, for a source that is missing, unreadable or holds nothing to read.
    """
    _refuse_overlap(sources)
    files = _once(_files(sources, form, skip)) if len(sources) > 1 else _files(sources, form, skip)
    try:
        first = next(files)
    except StopIteration:
        wanted = ", ".join(KINDS[form]) if form in KINDS else "images, Parquet files or .tar shards"
        raise UserError(f"{', '.join(sources)}: nothing to predict on ({wanted})") from None
    kind = first[0]
    return kind, _pieces(itertools.chain([first], files), columns or Columns())


def read_piece(piece: Piece, kind: str, columns: Columns) -> Iterator[Record]:
    """The records of a piece, one after the other. A damaged shard gives what is whole, then a record of the damage."""
    system, path = resolve(piece.file)
    if kind == "images":
        load = partial(read_image, path) if is_local(system) else partial(_read_remote, piece.file)
        yield Record(piece.file, None, load)
        return
    records = _tar_records if kind == "webdataset" else _parquet_records
    try:
        yield from records(piece, system, path, columns)
    except Exception as error:  # decompressors, pyarrow and tarfile have no common base
        if not _is_damage(error, is_local(system)):
            raise
        name = piece.file if piece.count < 0 else f"{piece.file}#{piece.start}-{piece.start + piece.count - 1}"
        yield Record(name, None, None, f"{name}: cannot be read to its end ({one_line(error)})")


def _refuse_overlap(sources: Sequence[str]) -> None:
    """Each image is to come once."""
    named: dict[str, str] = {}
    for source in sources:
        path = url_of(*resolve(source)).rstrip("/")
        if path in named:
            raise UserError(f"{source} is in {named[path]}, so its images would come twice; name it once")
        named[path] = source
    for path, source in named.items():
        place = path
        while "/" in place:
            place = place.rpartition("/")[0]
            if place in named:
                raise UserError(f"{source} is in {named[place]}, so its images would come twice; name it once")


def _once(files: Iterator[tuple[str, str, int]]) -> Iterator[tuple[str, str, int]]:
    """Without those that came before: patterns may meet in files."""
    seen: set[str] = set()
    for entry in files:
        if entry[1] not in seen:
            seen.add(entry[1])
            yield entry


def _files(sources: Sequence[str], form: str, skip: str | None) -> Iterator[tuple[str, str, int]]:
    """Kind, path or URL, and size of each file."""
    found = None if form == "auto" else form
    for source in sources:
        system, root = resolve(source)
        try:
            named = False
            if system.isdir(root):
                files = walk(system, root, skip)
            elif system.exists(root):
                files, named = iter([(root, system.size(root) or 0)]), True
            elif set(root) & set("*?["):
                files = _matching(system, root, source, skip)
            else:
                raise UserError(f"{source}: no such file or folder")
            for path, size in files:
                kind = next((kind for kind, ends in KINDS.items() if path.lower().endswith(ends)), None)
                if named and kind != form and form != "auto":
                    kind = form  # whoever names one file and its kind knows best
                elif kind is None or (form != "auto" and kind != form):
                    continue
                if found is not None and kind != found:
                    raise UserError(f"{source} holds {found} and {kind} ({path}): choose one by --format")
                found = kind
                yield kind, url_of(system, path), size
        except UserError:
            raise
        except Exception as error:  # each store has its own: no access, no such bucket, no network
            raise UserError(f"{source}: cannot be listed: {one_line(error)}") from None


def _matching(system: Any, pattern: str, source: str, skip: str | None) -> Iterator[tuple[str, int]]:
    """Paths and sizes of the files of a pattern, by name, without hidden ones and those in hidden folders."""
    fixed = pattern[: min(pattern.index(sign) for sign in "*?[" if sign in pattern)].rpartition("/")[0]
    for path in sorted(system.glob(pattern)):
        if is_hidden(path[len(fixed) :].lstrip("/")) or not system.isfile(path):
            continue
        if skip is not None and same(system, path.rpartition("/")[0], skip):
            raise UserError(f"--out {skip} holds {path}, which {source} means; name a folder for the results alone")
        yield path, system.size(path) or 0


def _pieces(files: Iterator[tuple[str, str, int]], columns: Columns) -> Iterator[Piece]:
    for kind, file, size in files:
        if kind == "images":
            yield Piece(file, 0, 1, size)
            continue
        try:
            ranges = list((_tar_ranges if kind == "webdataset" else _parquet_ranges)(file, columns))
        except UserError:
            raise
        except Exception as error:  # as in `read_piece`: its reader will say what is wrong
            if not _is_damage(error, is_local(resolve(file)[0])):
                raise UserError(f"{file}: cannot be read: {one_line(error)}") from None
            ranges = [(0, -1)]
        for start, count in ranges:
            yield Piece(file, start, count, size)


def _is_damage(error: Exception, local: bool) -> bool:
    """Whether a file is what is wrong, rather than the way to it, on which another try may succeed."""
    import pyarrow

    if isinstance(error, (tarfile.TarError, zlib.error, EOFError, pyarrow.ArrowInvalid, FileNotFoundError)):
        return True
    # Of local files the system's own errors have a number; readers that find damage raise OSError without one.
    return isinstance(error, PermissionError) or (local and isinstance(error, OSError) and error.errno is None)


def _read_remote(url: str) -> Tensor:
    """The image at a URL. What the store says of itself, not of the image, is raised as it is after some tries."""
    system, path = resolve(url)
    for attempt in range(READ_TRIES):
        try:
            return decode_image(system.cat_file(path), url)
        except (UserError, NotImplementedError):
            raise
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(f"{url}: cannot be read ({one_line(error)})") from None
        except Exception:  # each store has its own
            if attempt == READ_TRIES - 1:
                raise
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


# WebDataset


def _tar_ranges(file: str, _: Columns) -> Iterator[tuple[int, int]]:
    """Ranges of members of a plain local tar, in which skipping is free; any other is read in one go."""
    system, path = resolve(file)
    if not is_local(system) or not path.lower().endswith(".tar"):
        yield 0, -1
        return
    with tarfile.open(path, "r:", tarinfo=_Header) as tar:
        count = sum(1 for _ in _members(tar))
    for start in range(0, count, PIECE):
        yield start, min(PIECE, count - start)


def _tar_records(piece: Piece, system: Any, file: str, _: Columns) -> Iterator[Record]:
    stop = None if piece.count < 0 else piece.start + piece.count
    with (
        system.open(file, "rb") as opened,
        tarfile.open(fileobj=opened, mode="r:*" if is_local(system) else "r|*", tarinfo=_Header) as tar,
    ):
        for member in itertools.islice(_members(tar), piece.start, stop):
            name = f"{piece.file}#{member.name}"
            path = PurePosixPath(member.name)
            if not member.isreg():
                yield Record(
                    name, None, None, f"{name}: is a link, which is not followed in a shard; pack the image itself"
                )
                continue
            key = str(path.with_name(path.name.split(".")[0]))  # WebDataset's: up to the first dot of the name
            if member.size > LARGEST:
                yield Record(name, key, None, f"{name}: {member.size} bytes are too many for an image")
                continue
            content = tar.extractfile(member)
            assert content is not None  # it is a regular file
            yield Record(name, key, partial(decode_image, content.read(), name))


class _Header(tarfile.TarInfo):
    """A member's header. `tarfile` takes a damaged or missing one for the archive's end: here it is damage."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:  # the end as it should be
            raise
        except HeaderError as error:
            raise ReadError(f"damaged after {tarfile.offset} bytes: {error}") from None


def _members(tar: Any) -> Iterator[tarfile.TarInfo]:
    """The images in an archive."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # it would remember them all
        if (member.isreg() or member.islnk() or member.issym()) and is_image(PurePosixPath(member.name)):
            yield member


# Parquet


def _parquet_ranges(file: str, columns: Columns) -> Iterator[tuple[int, int]]:
    """Ranges of rows, none across row groups."""
    with _parquet(file) as parquet:
        _image_column(parquet.schema_arrow, columns, file)
        start = 0
        for index in range(parquet.metadata.num_row_groups):
            rows = parquet.metadata.row_group(index).num_rows
            step = max(PIECE, -(-rows // PARTS))
            yield from ((start + offset, min(step, rows - offset)) for offset in range(0, rows, step))
            start += rows


def _parquet_records(piece: Piece, system: Any, path: str, columns: Columns) -> Iterator[Record]:
    with _parquet(piece.file) as parquet:
        column = _image_column(parquet.schema_arrow, columns, piece.file)
        wanted = [column] if columns.id in (None, column) else [column, columns.id]
        stop = parquet.metadata.num_rows if piece.count < 0 else piece.start + piece.count
        row = 0
        for index in range(parquet.metadata.num_row_groups):
            end = row + parquet.metadata.row_group(index).num_rows
            if end <= piece.start:
                row = end
                continue
            for batch in parquet.iter_batches(16, row_groups=[index], columns=wanted, use_threads=False):
                for offset in range(max(piece.start - row, 0), min(len(batch), stop - row)):
                    name = f"{piece.file}#{row + offset}"
                    value = batch.column(column)[offset].as_py()
                    data = value.get("bytes") if isinstance(value, dict) else value
                    key = None if columns.id is None else _key(batch.column(columns.id)[offset])
                    if data is None:
                        yield Record(name, key, None, f"{name}: no bytes in column {column}")
                    else:
                        yield Record(name, key, partial(decode_image, data, name))
                row += len(batch)
                if row >= stop:
                    return
            if row < end:  # pages that say they are empty are not refused by the reader
                raise ReadError(f"row {row} and what follows is missing")


def _key(scalar: Any) -> str | None:
    """The text of an id; what claims to be text and is not is shown byte by byte."""
    try:
        value = scalar.as_py()
    except UnicodeDecodeError:
        value = scalar.as_buffer().to_pybytes()
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return None if value is None else str(value)


def _parquet(file: str) -> Any:
    """The file, read piece by piece."""
    import pyarrow.parquet

    system, path = resolve(file)
    opened = path if is_local(system) else system.open(path, "rb")
    return pyarrow.parquet.ParquetFile(opened, pre_buffer=False, buffer_size=2**20)


def _image_column(schema: Any, columns: Columns, file: str) -> str:
    """The name of the column with image bytes: bytes themselves, or structs with "bytes" in them (Hugging Face's)."""
    names = [field.name for field in schema]
    if columns.id is not None and columns.id not in names:
        raise UserError(f"{file} has no column {columns.id}, only {', '.join(names)}; give another --id-column")
    fitting = [field.name for field in schema if _holds_bytes(field.type)]
    if columns.image is not None:
        if columns.image in fitting:
            return columns.image
        why = "has no bytes in column" if columns.image in names else "has no column"
        raise UserError(f"{file} {why} {columns.image}; of use are: {', '.join(fitting) or 'none'}")
    if "image" in fitting:
        return "image"
    if len(fitting) != 1:
        found = f"several columns with bytes ({', '.join(fitting)})" if fitting else "no column with bytes"
        raise UserError(f"{file} has {found}: name the one with images by --image-column")
    return fitting[0]


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
