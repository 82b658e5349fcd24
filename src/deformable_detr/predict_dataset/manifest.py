"""The manifest of a run: its numbered units and everything that determines its results."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..utils.errors import UserError, first_line
from ..utils.files import prepare_folder
from .filesystem import OutputFolder
from .options import RESULT_OPTIONS, PredictDatasetOptions
from .parquet import ImageCounts, part_name, read_note, read_part, unit_of_part, write_note
from .sources import SourceRange

log = logging.getLogger(__name__)

FORMAT, VERSION = "deformable-detr predict-dataset", 1
# Every reader of the folder must see one table. Some read hidden files too, and refuse others than Parquet unless they
# are empty: the manifest is in the footer of a table of the same columns without rows, and the units are temporary.
MANIFEST, UNITS, SUCCESS, LOCK = ".manifest.parquet", ".units", "_SUCCESS", ".lock"
OLD_MANIFEST, OLD_UNITS = "_manifest.json", "_units.parquet"  # of version 0.1
MIN_UNIT_SIZE, MAX_UNIT_SIZE = 8, 256  # images
MIN_UNITS = 32  # small datasets get smaller units, to occupy several workers
_ROW_GROUP_SIZE = 16384  # what a worker reads to find its unit
_ENCODING = ("utf-8", "surrogateescape")  # file names need not be text, but Parquet strings do


@dataclass(frozen=True)
class Manifest:
    """A planned run.

    Attributes:
        run_id: Hash of everything that determines the results.
        num_units: Number of units, and of output files.
        num_images: None if some shards must be read to count them.
        options: With the format and unit size that were chosen.
    """

    run_id: str
    num_units: int
    num_images: int | None
    options: PredictDatasetOptions


def create_manifest(
    out: OutputFolder,
    model_hash: str,
    sources: Sequence[str],
    ranges: Iterator[SourceRange],
    options: PredictDatasetOptions,
    masks: bool = False,
) -> Manifest:
    """Group the ranges into units and write them with the manifest, or verify those of an earlier run.

    Without `options.unit_size`, the units have the size of the earlier run, else one that suits the dataset. `masks`:
    whether the results have a column of masks.

    Raises:
        UserError: The folder holds results of a different run; the message names the differences.
    """
    previous = _read_manifest(out)
    files = out.list_files()
    if previous is None and any(unit_of_part(name) is not None for name in files):
        raise UserError(f"--out {out.root} holds results without {MANIFEST}; choose another folder")
    unit_size = options.unit_size or (int(previous["settings"]["unit_size"]) if previous else None)
    if unit_size is None:
        unit_size, ranges = _default_unit_size(ranges)
    options = replace(options, unit_size=unit_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / UNITS
        num_units, num_images, num_files, listing_hash = _write_units(path, ranges, unit_size)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "model": model_hash,
            "settings": options.result_settings,
            "source": {"files": num_files, "images": num_images, "listing": listing_hash},
            "units": num_units,
            **({"masks": True} if masks else {}),
        }
        if previous is not None:
            _reject_different_run(out, previous, manifest)
        if previous is None or UNITS not in files:
            out.write(UNITS, lambda target: target.write_bytes(path.read_bytes()))
        if MANIFEST not in files:
            # For readers; the listing decides.
            manifest["sources"] = list(sources) if previous is None else previous.get("sources")
            write_note(out, MANIFEST, json.dumps(manifest, indent=2), masks)
        for name in {OLD_MANIFEST, OLD_UNITS}.intersection(files):
            out.delete(name)
    return Manifest(_hash(manifest), num_units, num_images, options)


def read_unit(out: OutputFolder, unit: int) -> list[SourceRange]:
    """Return the ranges of a unit."""
    import pyarrow.parquet as pq

    with out.open(UNITS) as file:
        columns = list(SourceRange._fields)
        table = pq.read_table(file, filters=[("unit", "==", unit)], columns=columns, use_threads=False)
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    return [SourceRange(file.decode(*_ENCODING), *rest) for file, *rest in rows]


def finished_units(out: OutputFolder, manifest: Manifest) -> dict[int, ImageCounts]:
    """Return the counts of the finished units; delete damaged files.

    Raises:
        UserError: A file belongs to a different run, or the storage fails.
    """
    units = [unit for name in out.list_files() if (unit := unit_of_part(name)) is not None]
    finished: dict[int, ImageCounts] = {}
    with ThreadPoolExecutor(16) as pool:
        for unit, part in zip(units, pool.map(partial(read_part, out), units), strict=True):
            if part is None:
                log.warning("%s is damaged; its images are predicted again", out.path(part_name(unit)))
                out.delete(part_name(unit))
            elif part[0] != manifest.run_id or unit >= manifest.num_units:
                raise UserError(f"--out {out.root} holds {part_name(unit)} of another run; choose another folder")
            else:
                finished[unit] = part[1]
    return finished


@contextmanager
def lock_output(out: OutputFolder) -> Iterator[None]:
    """Create the folder and, if it is local, lock it against other processes.

    Raises:
        UserError: The folder cannot be written or another process has locked it.
    """
    from filelock import FileLock, Timeout

    if not out.local:
        yield
        return
    root = prepare_folder(Path(out.root), "--out")
    lock = FileLock(root / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"--out {root} is in use by another process; wait for it or choose another folder") from None
    except (OSError, NotImplementedError):  # network file systems without locks
        yield
        return
    try:
        _delete_temporary_files(root)  # of a run that was killed
        yield
    finally:
        _delete_temporary_files(root)  # of workers that were stopped
        lock.release()


def _delete_temporary_files(root: Path) -> None:
    for pattern in (".part-*.parquet.*.tmp", "._*.tmp", "..*.tmp"):
        for file in root.glob(pattern):
            file.unlink(missing_ok=True)


def _default_unit_size(ranges: Iterator[SourceRange]) -> tuple[int, Iterator[SourceRange]]:
    """Return a unit size that depends only on the dataset, and the ranges again."""
    first = list(islice(ranges, MAX_UNIT_SIZE * MIN_UNITS))
    count = sum(max(source_range.count, 1) for source_range in first)
    return min(MAX_UNIT_SIZE, max(MIN_UNIT_SIZE, -(-count // MIN_UNITS))), chain(first, ranges)


def _write_units(path: Path, ranges: Iterator[SourceRange], unit_size: int) -> tuple[int, int | None, int, str]:
    """Write the ranges with their units; return the numbers of units, images and files, and the listing's hash."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = [pa.int64(), pa.binary(), pa.int64(), pa.int64(), pa.int64()]
    schema = pa.schema(list(zip(["unit", *SourceRange._fields], types, strict=True)))
    listing = hashlib.sha256()
    units, images, countable, files, last_file = 0, 0, True, 0, None
    numbered = _number_units(ranges, unit_size)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(islice(numbered, _ROW_GROUP_SIZE)):
            for unit, (file, start, count, size) in group:
                listing.update(f"{file}\0{start}\0{count}\0{size}\n".encode(*_ENCODING))
                units, images, countable = unit + 1, images + max(count, 0), countable and count >= 0
                files, last_file = files + (file != last_file), file
            rows = [(unit, item.file.encode(*_ENCODING), *item[1:]) for unit, item in group]
            columns = dict(zip(schema.names, zip(*rows, strict=True), strict=True))
            writer.write_table(pa.table(columns, schema=schema))
    return units, images if countable else None, files, listing.hexdigest()


def _number_units(ranges: Iterable[SourceRange], unit_size: int) -> Iterator[tuple[int, SourceRange]]:
    """Yield each range with its unit. A unit is filled up to its size; a range of unknown size is a unit alone."""
    unit, size = 0, 0
    for source_range in ranges:
        if size and (size >= unit_size or source_range.count < 0):
            unit, size = unit + 1, 0
        yield unit, source_range
        size += unit_size if source_range.count < 0 else source_range.count


def _read_manifest(out: OutputFolder) -> dict[str, Any] | None:
    files = out.list_files()
    name = next((name for name in (MANIFEST, OLD_MANIFEST) if name in files), None)
    if name is None:
        return None
    try:
        with out.open(name) as file:
            manifest = json.loads(file.read() if name == OLD_MANIFEST else read_note(file))
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise ValueError(f"version {manifest['version']}")
        _ = [manifest["settings"][name] for name in RESULT_OPTIONS]
        _ = manifest["model"], manifest["units"], manifest["source"]["files"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{out.path(name)} is not valid ({first_line(error)}); choose another --out") from None
    return manifest


def _reject_different_run(out: OutputFolder, previous: dict[str, Any], current: dict[str, Any]) -> None:
    if _hash(previous) == _hash(current):
        return
    old, new = previous["settings"], current["settings"]
    changes = [
        f"--{key.replace('_', '-')} {old.get(key)}, now {new.get(key)}"
        for key in {**new, **old}
        if old.get(key) != new.get(key)
    ]
    if previous["model"] != current["model"]:
        changes.insert(0, "another model")
    if (had_masks := "masks" in previous) != ("masks" in current):
        changes.insert(0, "masks, now without" if had_masks else "no masks, now with them")
    same_units = old["format"] == new["format"] and old["unit_size"] == new["unit_size"]
    if same_units and (previous["source"], previous["units"]) != (current["source"], current["units"]):
        files, files_now = previous["source"]["files"], current["source"]["files"]
        changes.append(f"different source files ({files} files, now {files_now})")
    raise UserError(
        f"--out {out.root} holds results of another run ({'; '.join(changes)}): "
        "use that run's settings or choose another folder"
    )


def _hash(manifest: dict[str, Any]) -> str:
    relevant = {key: value for key, value in manifest.items() if key != "sources"}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()
