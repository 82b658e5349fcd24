"""The sources: folders of images, Parquet files with image bytes, WebDataset shards."""

import itertools
import logging
import os
import tarfile
import time
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from tarfile import EOFHeaderError, HeaderError, ReadError  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any, NamedTuple

from torch import Tensor

from ..data.discovery import describe_unread, is_hidden, is_image, is_unread_image
from ..data.matching import IMAGE_SUFFIXES
from ..utils.errors import UserError, first_line
from ..utils.files import open_regular
from ..utils.images import decode_image, read_image
from ..utils.large_tiff import read_or_name
from .filesystem import is_local, resolve_url, to_url, walk_files
from .options import PredictDatasetOptions

log = logging.getLogger(__name__)

FORMATS: dict[str, tuple[str, ...]] = {
    "images": tuple(sorted(IMAGE_SUFFIXES)),
    "parquet": (".parquet", ".pq"),
    "webdataset": (".tar", ".tar.gz", ".tgz"),
}
MIN_RANGE = 256  # images of a shard that are read as one range
MAX_RANGES = 8  # per Parquet row group, whose earlier rows are read again for each range
MAX_IMAGE_BYTES = 512 * 2**20  # of one image in a shard
READ_ATTEMPTS = 3  # per image in a remote store


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
        load: Reads it, or names a TIFF that is larger than memory; raises UserError. None: see `error`.
        error: Why it cannot be read.
    """

    image: str
    key: str | None
    load: Callable[[], Tensor | Path] | None
    error: str | None = None


def find_ranges(
    sources: Sequence[str], options: PredictDatasetOptions, out: str | None = None
) -> tuple[str, Iterator[SourceRange]]:
    """Return the format of the sources and their ranges, always in the same order.

    Args:
        sources: Folders (searched recursively), files and patterns with *, as paths or URLs. Each file is used once.
        options: With the format, a key of `FORMATS` or auto: the only format that is found.
        out: Folder of the results, which is left out.

    Raises:
        UserError: A source is missing, unreadable, or has no images. May be raised during the iteration.
    """
    files = _list_files(sources, options.format, out)
    try:
        first = next(files)
    except StopIteration:
        expected = ", ".join(FORMATS.get(options.format, ["images", "Parquet files or .tar shards"]))
        raise UserError(f"{', '.join(sources)}: found no {expected}") from None
    return first[0], _split_files(itertools.chain([first], files), options)


def read_range(source_range: SourceRange, options: PredictDatasetOptions) -> Iterator[SourceImage]:
    """Yield the images of a range. A damaged shard yields its readable images, then one with the error."""
    system, path = resolve_url(source_range.file)
    if options.format == "images":
        read_local = read_image if options.tile is None else read_or_name
        load = partial(read_local, path) if is_local(system) else partial(_read_remote, source_range.file)
        yield SourceImage(source_range.file, None, load)
        return
    try:
        if options.format == "webdataset":
            yield from _tar_images(source_range, system, path)
        else:
            yield from _parquet_images(source_range, options)
    except Exception as error:  # decompressors, pyarrow and tarfile have no common base class
        if not _is_damage(error, is_local(system)):
            raise
        file, start, count, _ = source_range
        name = file if count < 0 else f"{file}#{start}-{start + count - 1}"
        yield SourceImage(name, None, None, f"{name}: damaged, cannot be read to its end ({first_line(error)})")


SourceFile = tuple[str, str, int]  # format, path or URL, size


def _list_files(sources: Sequence[str], format: str, out: str | None) -> Iterator[SourceFile]:
    common_format = None if format == "auto" else format
    seen: set[str] = set()
    for source in sources:
        system, root = resolve_url(source)
        unread: list[str] = []
        try:
            for path, size in _matching_files(system, root, source, out):
                file_format = next((name for name, ends in FORMATS.items() if path.lower().endswith(ends)), None)
                if path == root and format != "auto":
                    file_format = format  # the user named this file and its format
                url = to_url(system, path)
                if file_format is None and is_unread_image(name := PurePosixPath(path).name):
                    unread.append(name)
                if file_format is None or (format != "auto" and file_format != format) or url in seen:
                    continue
                if common_format is not None and file_format != common_format:
                    raise UserError(f"{source} holds {common_format} and {file_format} ({path}); choose with --format")
                common_format = file_format
                if len(sources) > 1:
                    seen.add(url)
                yield file_format, url, size
        except UserError:
            raise
        except Exception as error:  # each store has its own exceptions
            raise UserError(f"{source}: cannot be listed: {first_line(error)}") from None
        if unread:
            log.warning("%s: %s", source, describe_unread(unread))


def _matching_files(system: Any, root: str, source: str, out: str | None) -> Iterator[tuple[str, int]]:
    """Yield path and size of the files of a source, sorted, without hidden files and the results."""
    folder = root
    if system.isdir(root):
        files = walk_files(system, root)
    elif system.exists(root):
        yield root, system.size(root) or 0
        return
    elif wildcards := set(root) & set("*?["):
        folder = root[: min(map(root.index, wildcards))].rpartition("/")[0]
        matches = sorted(system.glob(root, detail=True).items())
        files = (
            (path, entry.get("size") or 0)
            for path, entry in matches
            if entry["type"] != "directory" and not is_hidden(path[len(folder) :].lstrip("/"))
        )
    else:
        raise UserError(f"{source}: no such file or folder")
    results = _folder_below(system, folder, out)
    if results == folder:
        raise UserError(f"--out {out} is the folder of the source {source}; choose a separate folder for the results")
    yield from (file for file in files if results is None or not file[0].startswith(f"{results}/"))


def _folder_below(system: Any, folder: str, other: str | None) -> str | None:
    """Return the path of another folder as it appears below `folder`, or None if it is elsewhere."""
    if other is None:
        return None
    if is_local(system):
        folder_name, other = os.path.realpath(folder), os.path.realpath(other)
    else:
        folder_name = to_url(system, folder)
    return folder + other[len(folder_name) :] if f"{other}/".startswith(f"{folder_name}/") else None


def _split_files(files: Iterator[SourceFile], options: PredictDatasetOptions) -> Iterator[SourceRange]:
    for format, file, size in files:
        if format == "images":
            yield SourceRange(file, 0, 1, size)
            continue
        try:
            if is_local(resolve_url(file)[0]):
                open_regular(file).close()
            ranges = list(_tar_ranges(file) if format == "webdataset" else _parquet_ranges(file, options))
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


def _tar_ranges(file: str) -> Iterator[tuple[int, int]]:
    """Yield ranges of members of an uncompressed local tar, where skipping is cheap; another is one range."""
    system, path = resolve_url(file)
    if not is_local(system) or not path.lower().endswith(".tar"):
        yield 0, -1
        return
    with open_regular(path) as opened, tarfile.open(fileobj=opened, mode="r:", tarinfo=_StrictHeader) as tar:
        count = sum(1 for _ in _image_members(tar))
    for start in range(0, count, MIN_RANGE):
        yield start, min(MIN_RANGE, count - start)


def _tar_images(source_range: SourceRange, system: Any, file: str) -> Iterator[SourceImage]:
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


def _parquet_ranges(file: str, options: PredictDatasetOptions) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows, none across row groups."""
    with _open_parquet(file) as parquet:
        _image_column(parquet.schema_arrow, options, file)
        for start, end in itertools.pairwise(_row_group_bounds(parquet)):
            step = max(MIN_RANGE, -(-(end - start) // MAX_RANGES))
            yield from ((row, min(step, end - row)) for row in range(start, end, step))


def _parquet_images(source_range: SourceRange, options: PredictDatasetOptions) -> Iterator[SourceImage]:
    file, start, count, _ = source_range
    with _open_parquet(file) as parquet:
        image_column = _image_column(parquet.schema_arrow, options, file)
        names = list({image_column, options.id_column or image_column})
        bounds = _row_group_bounds(parquet)
        stop = bounds[-1] if count < 0 else start + count
        first = bisect_right(bounds, start) - 1
        row, groups = bounds[first], range(first, bisect_left(bounds, stop))
        for batch in parquet.iter_batches(16, row_groups=groups, columns=names, use_threads=False):
            for offset in range(max(start - row, 0), min(len(batch), stop - row)):
                key = None if options.id_column is None else _to_key(batch.column(options.id_column)[offset])
                yield _parquet_image(f"{file}#{row + offset}", key, batch.column(image_column)[offset].as_py())
            row += len(batch)
            if row >= stop:
                return
        if row < stop:  # the reader accepts pages that claim to be empty
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
    from pyarrow.parquet import ParquetFile

    system, path = resolve_url(file)
    return ParquetFile(path, filesystem=system, pre_buffer=False, buffer_size=2**20)


def _row_group_bounds(parquet: Any) -> list[int]:
    """Return the first row of each row group, and the number of rows."""
    metadata = parquet.metadata
    sizes = (metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
    return list(itertools.accumulate(sizes, initial=0))


def _image_column(schema: Any, options: PredictDatasetOptions, file: str) -> str:
    """Return the column with image bytes: binary, or structs with a binary field "bytes" (Hugging Face)."""
    if options.id_column is not None and options.id_column not in schema.names:
        problem = f"has no column {options.id_column}, only {', '.join(schema.names)}"
        raise UserError(f"{file} {problem}; choose another --id-column")
    binary = [field.name for field in schema if _holds_bytes(field.type)]
    candidates = [options.image_column or "image"] if options.image_column or "image" in binary else binary
    if len(candidates) != 1 or candidates[0] not in binary:
        problem = f"has no bytes in column {options.image_column}" if options.image_column else "has no column image"
        listing = ", ".join(binary) or "none"
        raise UserError(f"{file} {problem}; name the images with --image-column (columns with bytes: {listing})")
    return candidates[0]


def _holds_bytes(data_type: Any) -> bool:
    from pyarrow import types

    if types.is_struct(data_type):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in data_type)
    return types.is_binary(data_type) or types.is_large_binary(data_type) or types.is_binary_view(data_type)
