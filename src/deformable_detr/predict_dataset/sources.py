"""The sources: folders of images, Parquet files with image bytes, WebDataset shards."""

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
from ..utils.errors import UserError, first_line
from ..utils.images import decode_image, read_image
from .filesystem import is_local, is_same_path, resolve_url, to_url, walk_files

FORMATS: dict[str, tuple[str, ...]] = {
    "images": tuple(sorted(IMAGE_SUFFIXES)),
    "parquet": (".parquet", ".pq"),
    "webdataset": (".tar", ".tar.gz", ".tgz"),
}
MIN_RANGE = 256  # images of a shard that are read as one range
MAX_RANGES = 8  # per Parquet row group, whose earlier rows are read again for each range
MAX_IMAGE_BYTES = 512 * 2**20  # of one image in a shard
READ_ATTEMPTS = 3


class ParquetColumns(NamedTuple):
    """Parquet columns with image bytes (default: found by type) and with a name for the row (default: none)."""

    image: str | None = None
    id: str | None = None


class SourceRange(NamedTuple):
    """An image file, or `count` images of a shard beginning at `start`; count −1: to its end."""

    file: str
    start: int
    count: int
    size: int  # bytes of the file


class SourceImage(NamedTuple):
    """An image that has not been read yet.

    Attributes:
        image: Path or URL; in a shard followed by "#" and the member's name, or the row counted from 0.
        key: Its name in the shard.
        load: Reads it; raises UserError. None: see `error`.
        error: Why it cannot be read.
    """

    image: str
    key: str | None
    load: Callable[[], Tensor] | None
    error: str | None = None


def find_ranges(
    sources: Sequence[str], format: str = "auto", columns: ParquetColumns | None = None, skip: str | None = None
) -> tuple[str, Iterator[SourceRange]]:
    """Return the format of the sources and their ranges, always in the same order.

    Args:
        sources: Folders (searched recursively), files and patterns with *, as paths or URLs.
        format: A key of `FORMATS`, or auto: the only format that is found.
        skip: Folder to leave out.

    Raises:
        UserError: A source is missing, unreadable, or has no images. May be raised during the iteration.
    """
    _reject_overlap(sources)
    files = _list_files(sources, format, skip)
    if len(sources) > 1:
        files = _unique(files)
    try:
        first = next(files)
    except StopIteration:
        expected = ", ".join(FORMATS[format]) if format in FORMATS else "images, Parquet files or .tar shards"
        raise UserError(f"{', '.join(sources)}: found no {expected}") from None
    return first[0], _split_files(itertools.chain([first], files), columns or ParquetColumns())


def read_range(source_range: SourceRange, format: str, columns: ParquetColumns) -> Iterator[SourceImage]:
    """Yield the images of a range. A damaged shard yields its readable images, then one with the error."""
    system, path = resolve_url(source_range.file)
    if format == "images":
        load = partial(read_image, path) if is_local(system) else partial(_read_remote, source_range.file)
        yield SourceImage(source_range.file, None, load)
        return
    images = _tar_images if format == "webdataset" else _parquet_images
    try:
        yield from images(source_range, system, path, columns)
    except Exception as error:  # decompressors, pyarrow and tarfile have no common base class
        if not _is_damage(error, is_local(system)):
            raise
        file, start, count, _ = source_range
        name = file if count < 0 else f"{file}#{start}-{start + count - 1}"
        yield SourceImage(name, None, None, f"{name}: damaged, cannot be read to its end ({first_line(error)})")


def _reject_overlap(sources: Sequence[str]) -> None:
    """Raise UserError if a source contains another, whose images would then be predicted twice."""
    named: dict[str, str] = {}
    for source in sources:
        path = to_url(*resolve_url(source)).rstrip("/")
        if path in named:
            raise UserError(f"source {source} is contained in {named[path]}; name it once")
        named[path] = source
    for path, source in named.items():
        parent = path
        while "/" in parent:
            parent = parent.rpartition("/")[0]
            if parent in named:
                raise UserError(f"source {source} is contained in {named[parent]}; name it once")


SourceFile = tuple[str, str, int]  # format, path or URL, size


def _unique(files: Iterator[SourceFile]) -> Iterator[SourceFile]:
    """Leave out files that several patterns match."""
    seen: set[str] = set()
    for file in files:
        if file[1] not in seen:
            seen.add(file[1])
            yield file


def _list_files(sources: Sequence[str], format: str, skip: str | None) -> Iterator[SourceFile]:
    common_format = None if format == "auto" else format
    for source in sources:
        system, root = resolve_url(source)
        try:
            for path, size, is_single in _matching_files(system, root, source, skip):
                file_format = next((name for name, ends in FORMATS.items() if path.lower().endswith(ends)), None)
                if is_single and format != "auto":
                    file_format = format  # the user named this file and its format
                elif file_format is None or (format != "auto" and file_format != format):
                    continue
                if common_format is not None and file_format != common_format:
                    raise UserError(f"{source} holds {common_format} and {file_format} ({path}); choose with --format")
                common_format = file_format
                yield file_format, to_url(system, path), size
        except UserError:
            raise
        except Exception as error:  # each store has its own exceptions
            raise UserError(f"{source}: cannot be listed: {first_line(error)}") from None


def _matching_files(system: Any, root: str, source: str, skip: str | None) -> Iterator[tuple[str, int, bool]]:
    """Yield path and size of the files of a source, and whether the source is one file."""
    if system.isdir(root):
        yield from ((path, size, False) for path, size in walk_files(system, root, skip))
    elif system.exists(root):
        yield root, system.size(root) or 0, True
    elif set(root) & set("*?["):
        yield from ((path, size, False) for path, size in _glob(system, root, source, skip))
    else:
        raise UserError(f"{source}: no such file or folder")


def _glob(system: Any, pattern: str, source: str, skip: str | None) -> Iterator[tuple[str, int]]:
    """Yield path and size of the files that match a pattern, sorted, without hidden files and folders."""
    prefix = pattern[: min(pattern.index(wildcard) for wildcard in "*?[" if wildcard in pattern)].rpartition("/")[0]
    for path in sorted(system.glob(pattern)):
        if is_hidden(path[len(prefix) :].lstrip("/")) or not system.isfile(path):
            continue
        if skip is not None and is_same_path(system, path.rpartition("/")[0], skip):
            raise UserError(f"--out {skip} contains {path}, which matches {source}; choose a folder for the results")
        yield path, system.size(path) or 0


def _split_files(files: Iterator[SourceFile], columns: ParquetColumns) -> Iterator[SourceRange]:
    for format, file, size in files:
        if format == "images":
            yield SourceRange(file, 0, 1, size)
            continue
        try:
            ranges = list((_tar_ranges if format == "webdataset" else _parquet_ranges)(file, columns))
        except UserError:
            raise
        except Exception as error:  # see `read_range`, which reports damage
            if not _is_damage(error, is_local(resolve_url(file)[0])):
                raise UserError(f"{file}: cannot be read: {first_line(error)}") from None
            ranges = [(0, -1)]
        for start, count in ranges:
            yield SourceRange(file, start, count, size)


def _is_damage(error: Exception, local: bool) -> bool:
    """Return whether the file is at fault, rather than the storage, where a retry may succeed."""
    import pyarrow

    if isinstance(error, (tarfile.TarError, zlib.error, EOFError, pyarrow.ArrowInvalid, FileNotFoundError)):
        return True
    # Of a local file, an OSError of the system has an errno; readers that find damage raise it without one.
    return isinstance(error, PermissionError) or (local and isinstance(error, OSError) and error.errno is None)


def _read_remote(url: str) -> Tensor:
    """Read the image at a URL; retry if the store fails, and raise its exception after the last attempt."""
    system, path = resolve_url(url)
    for attempt in range(READ_ATTEMPTS):
        try:
            return decode_image(system.cat_file(path), url)
        except (UserError, NotImplementedError):
            raise
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(f"{url}: cannot be read ({first_line(error)})") from None
        except Exception:  # each store has its own exceptions
            if attempt == READ_ATTEMPTS - 1:
                raise
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


def _tar_ranges(file: str, _: ParquetColumns) -> Iterator[tuple[int, int]]:
    """Yield ranges of members of an uncompressed local tar, where skipping is cheap; another is one range."""
    system, path = resolve_url(file)
    if not is_local(system) or not path.lower().endswith(".tar"):
        yield 0, -1
        return
    with tarfile.open(path, "r:", tarinfo=_StrictHeader) as tar:
        count = sum(1 for _ in _image_members(tar))
    for start in range(0, count, MIN_RANGE):
        yield start, min(MIN_RANGE, count - start)


def _tar_images(source_range: SourceRange, system: Any, file: str, _: ParquetColumns) -> Iterator[SourceImage]:
    stop = None if source_range.count < 0 else source_range.start + source_range.count
    mode = "r:*" if is_local(system) else "r|*"
    with system.open(file, "rb") as opened, tarfile.open(fileobj=opened, mode=mode, tarinfo=_StrictHeader) as tar:
        for member in itertools.islice(_image_members(tar), source_range.start, stop):
            name = f"{source_range.file}#{member.name}"
            path = PurePosixPath(member.name)
            if not member.isreg():
                yield SourceImage(name, None, None, f"{name}: links in shards are not followed; pack the image itself")
                continue
            key = str(path.with_name(path.name.split(".")[0]))  # WebDataset: up to the first dot of the name
            if member.size > MAX_IMAGE_BYTES:
                yield SourceImage(name, key, None, f"{name}: {member.size} bytes are too large for an image")
                continue
            content = tar.extractfile(member)
            assert content is not None  # it is a regular file
            yield SourceImage(name, key, partial(decode_image, content.read(), name))


class _StrictHeader(tarfile.TarInfo):
    """A member's header. `tarfile` takes a damaged or missing one for the end of the archive; here it is an error."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:  # the regular end
            raise
        except HeaderError as error:
            raise ReadError(f"damaged after {tarfile.offset} bytes: {error}") from None


def _image_members(tar: Any) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # else it keeps them all in memory
        if (member.isreg() or member.islnk() or member.issym()) and is_image(PurePosixPath(member.name)):
            yield member


def _parquet_ranges(file: str, columns: ParquetColumns) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows, none across row groups."""
    with _open_parquet(file) as parquet:
        _image_column(parquet.schema_arrow, columns, file)
        start = 0
        for index in range(parquet.metadata.num_row_groups):
            rows = parquet.metadata.row_group(index).num_rows
            step = max(MIN_RANGE, -(-rows // MAX_RANGES))
            yield from ((start + offset, min(step, rows - offset)) for offset in range(0, rows, step))
            start += rows


def _parquet_images(
    source_range: SourceRange, system: Any, path: str, columns: ParquetColumns
) -> Iterator[SourceImage]:
    file, start, count, _ = source_range
    with _open_parquet(file) as parquet:
        image_column = _image_column(parquet.schema_arrow, columns, file)
        names = [image_column] if columns.id in (None, image_column) else [image_column, columns.id]
        stop = parquet.metadata.num_rows if count < 0 else start + count
        row = 0
        for index in range(parquet.metadata.num_row_groups):
            end = row + parquet.metadata.row_group(index).num_rows
            if end <= start:
                row = end
                continue
            for batch in parquet.iter_batches(16, row_groups=[index], columns=names, use_threads=False):
                for offset in range(max(start - row, 0), min(len(batch), stop - row)):
                    key = None if columns.id is None else _to_key(batch.column(columns.id)[offset])
                    yield _parquet_image(f"{file}#{row + offset}", key, batch.column(image_column)[offset].as_py())
                row += len(batch)
                if row >= stop:
                    return
            if row < end:  # the reader accepts pages that claim to be empty
                raise ReadError(f"the rows from {row} on are missing")


def _parquet_image(name: str, key: str | None, value: Any) -> SourceImage:
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None:
        return SourceImage(name, key, None, f"{name}: no image bytes in this row")
    return SourceImage(name, key, partial(decode_image, data, name))


def _to_key(scalar: Any) -> str | None:
    """Return the text of an id; bytes that are not UTF-8 become escapes."""
    try:
        value = scalar.as_py()
    except UnicodeDecodeError:
        value = scalar.as_buffer().to_pybytes()
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return None if value is None else str(value)


def _open_parquet(file: str) -> Any:
    import pyarrow.parquet

    system, path = resolve_url(file)
    opened = path if is_local(system) else system.open(path, "rb")
    return pyarrow.parquet.ParquetFile(opened, pre_buffer=False, buffer_size=2**20)


def _image_column(schema: Any, columns: ParquetColumns, file: str) -> str:
    """Return the column with image bytes: binary, or structs with a binary field "bytes" (Hugging Face)."""
    names = [field.name for field in schema]
    if columns.id is not None and columns.id not in names:
        raise UserError(f"{file} has no column {columns.id}, only {', '.join(names)}; choose another --id-column")
    binary = [field.name for field in schema if _holds_bytes(field.type)]
    if columns.image is not None:
        if columns.image in binary:
            return columns.image
        problem = "has no bytes in column" if columns.image in names else "has no column"
        raise UserError(f"{file} {problem} {columns.image}; columns with bytes: {', '.join(binary) or 'none'}")
    if "image" in binary:
        return "image"
    if len(binary) != 1:
        count = f"several columns with bytes ({', '.join(binary)})" if binary else "no column with bytes"
        raise UserError(f"{file} has {count}; name the one with images with --image-column")
    return binary[0]


def _holds_bytes(data_type: Any) -> bool:
    from pyarrow import types

    if types.is_struct(data_type):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in data_type)
    return types.is_binary(data_type) or types.is_large_binary(data_type) or types.is_binary_view(data_type)
