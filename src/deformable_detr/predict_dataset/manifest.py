"""The numbered units of a run, and all that decides its results, written down before the first of them."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..utils.errors import UserError
from ..utils.files import prepare_folder
from .filesystem import Store, one_line
from .parquet import Counts, part_name, part_unit, read_part
from .sources import Columns, Piece

FORMAT, VERSION = "deformable-detr predict-dataset", 1
MANIFEST, PLAN, DONE, LOCK = "_manifest.json", "_plan.parquet", "_SUCCESS", ".lock"
_LEFTOVER = re.compile(r"\.(part-\d{6,}\.parquet|_manifest\.json|_plan\.parquet|_SUCCESS)\.\d+\.tmp")
LARGE = 256  # images of a unit; sets of under 32 times as many get smaller units, so that they spread over workers
SMALL, SPREAD = 8, 32
_GROUP = 16384  # rows of a row group: what a worker reads to find its unit
_NAME = ("utf-8", "surrogateescape")  # file names need not be text; Parquet's strings do


@dataclass(frozen=True)
class Settings:
    """What, beside the model and the sources, decides the results: another value is another run."""

    kind: str
    threshold: float
    top_k: int
    batch_size: int
    unit_size: int
    image_column: str | None = None
    id_column: str | None = None

    @property
    def columns(self) -> Columns:
        return Columns(self.image_column, self.id_column)


@dataclass(frozen=True)
class Plan:
    """run: the hash of all that decides the results. images: none where shards have to be read to know."""

    run: str
    units: int
    images: int | None
    settings: Settings


def make_plan(
    store: Store, model: str, sources: Iterable[str], pieces: Iterator[Piece], unit_size: int | None, **settings: Any
) -> Plan:
    """Groups the pieces into units and writes plan and manifest; where there are some, they must be the same.

    model: hash of the model. unit_size: images of a unit; none: that of the run before, or what suits the set.
    settings: the other fields of `Settings`.
    Raises UserError, naming what differs, where the folder has results of another run.
    """
    before = _read_manifest(store)
    if before is None and any(part_unit(name) is not None for name in store.names()):
        raise UserError(f"--out {store.root} holds results without {MANIFEST}: choose another folder")
    if unit_size is None and before is not None:
        unit_size = int(before["settings"]["unit_size"])
    if unit_size is None:
        unit_size, pieces = _suitable(pieces)
    chosen = Settings(unit_size=unit_size, **settings)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PLAN
        units, images, files, listing = _write_plan(path, pieces, chosen.unit_size)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "model": model,
            "settings": asdict(chosen),
            "source": {"files": files, "images": images, "listing": listing},
            "units": units,
        }
        if before is not None:
            _refuse_other(store, before, manifest)
        if before is None or PLAN not in store.names():
            store.put(PLAN, lambda target: target.write_bytes(path.read_bytes()))
        if before is None:
            manifest["sources"] = list(sources)  # for whoever reads it: the listing decides
            text = json.dumps(manifest, indent=2) + "\n"
            store.put(MANIFEST, lambda target: target.write_text(text, encoding="utf-8"))
    return Plan(_hash(manifest), units, images, chosen)


def read_unit(store: Store, unit: int) -> list[Piece]:
    """The pieces of a unit."""
    import pyarrow.parquet as pq

    with store.open(PLAN) as file:
        table = pq.read_table(file, filters=[("unit", "==", unit)], columns=list(Piece._fields), use_threads=False)
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    return [Piece(file if isinstance(file, str) else file.decode(*_NAME), *rest) for file, *rest in rows]


def finished(store: Store, plan: Plan) -> dict[int, Counts]:
    """The units that are done. Damaged files are removed, so that their units come again.

    Raises UserError for a file of another run, and where the storage fails.
    """
    units = [unit for name in store.names() if (unit := part_unit(name)) is not None]
    found: dict[int, Counts] = {}

    def read(unit: int) -> tuple[str, Counts] | None:
        try:
            return read_part(store, unit)
        except OSError as error:
            what = f"{part_name(unit)} cannot be read: {error.strerror or error}"
            raise UserError(f"--out {store.root}: {what}; start again when the storage works") from None

    with ThreadPoolExecutor(16) as pool:
        for unit, part in zip(units, pool.map(read, units), strict=True):
            if part is None:
                store.remove(part_name(unit))
            elif part[0] != plan.run or unit >= plan.units:
                raise UserError(f"--out {store.root} holds {part_name(unit)} of another run: choose another folder")
            else:
                found[unit] = part[1]
    return found


@contextmanager
def held(store: Store) -> Iterator[None]:
    """The folder, made where missing, and to this process alone where it is local.

    Raises UserError where it cannot be written, and where another process holds it.
    """
    from filelock import FileLock, Timeout

    if not store.local:
        yield
        return
    root = prepare_folder(Path(store.root), "--out")
    lock = FileLock(root / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"--out {root} is being written by another process: wait for it, or choose another") from None
    except (OSError, NotImplementedError):  # network file systems without locks: two runs would write the same
        yield
        return
    try:
        for leftover in root.glob(".*.tmp"):  # of a run that was killed
            if _LEFTOVER.fullmatch(leftover.name):
                leftover.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def _suitable(pieces: Iterator[Piece]) -> tuple[int, Iterator[Piece]]:
    """The size of a unit, which follows from the set alone, and the pieces again."""
    first = list(islice(pieces, LARGE * SPREAD))
    count = sum(max(piece.count, 1) for piece in first)
    return min(LARGE, max(SMALL, -(-count // SPREAD))), chain(first, pieces)


def _write_plan(path: Path, pieces: Iterator[Piece], unit_size: int) -> tuple[int, int | None, int, str]:
    """Units, images (none: unknown), files and the hash of the listing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = [pa.int64(), pa.binary(), pa.int64(), pa.int64(), pa.int64()]
    schema = pa.schema(list(zip(["unit", *Piece._fields], kinds, strict=True)))
    listing = hashlib.sha256()
    units, images, known, files, last = 0, 0, True, 0, None
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        waiting: list[tuple[Any, ...]] = []
        for unit, piece in _numbered(pieces, unit_size):
            listing.update(f"{piece.file}\0{piece.start}\0{piece.count}\0{piece.size}\n".encode(*_NAME))
            waiting.append((unit, piece.file.encode(*_NAME), *piece[1:]))
            units, images, known = unit + 1, images + max(piece.count, 0), known and piece.count >= 0
            files, last = files + (piece.file != last), piece.file
            if len(waiting) == _GROUP:
                writer.write_table(_table(waiting, schema))
                waiting = []
        if waiting:
            writer.write_table(_table(waiting, schema))
    return units, images if known else None, files, listing.hexdigest()


def _table(rows: list[tuple[Any, ...]], schema: Any) -> Any:
    import pyarrow as pa

    return pa.table(dict(zip(schema.names, zip(*rows, strict=True), strict=True)), schema=schema)


def _numbered(pieces: Iterable[Piece], unit_size: int) -> Iterator[tuple[int, Piece]]:
    """Each piece with its unit: pieces are added to one until it has its size; one of unknown size is a unit alone."""
    unit, size = 0, 0
    for piece in pieces:
        if size and (size >= unit_size or piece.count < 0):
            unit, size = unit + 1, 0
        yield unit, piece
        size += unit_size if piece.count < 0 else piece.count


def _read_manifest(store: Store) -> dict[str, Any] | None:
    if MANIFEST not in store.names():
        return None
    try:
        with store.open(MANIFEST) as file:
            manifest = json.loads(file.read())
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise ValueError(f"version {manifest['version']}")
        Settings(**manifest["settings"])
        _ = manifest["model"], manifest["units"], manifest["source"]["files"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        where = store.path(MANIFEST)
        raise UserError(f"{where} cannot be used ({one_line(error)}): choose another --out") from None
    return manifest


def _refuse_other(store: Store, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError, naming the difference, unless both are the same run."""
    then, these = before["settings"], now["settings"]
    changed = [f"--{key.replace('_', '-')} {then[key]}, now {these[key]}" for key in these if then[key] != these[key]]
    if before["model"] != now["model"]:
        changed.insert(0, "another model")
    if before["source"] != now["source"] or before["units"] != now["units"]:
        old, new = before["source"]["files"], now["source"]["files"]
        if then["kind"] == these["kind"] and then["unit_size"] == these["unit_size"]:
            changed.append(f"other or changed source files ({old} files, now {new})")
    if _hash(before) != _hash(now):
        raise UserError(
            f"--out {store.root} holds results of another run ({'; '.join(changed)}): "
            "go on with what that run had, or choose another folder"
        )


def _hash(manifest: dict[str, Any]) -> str:
    decisive = {key: value for key, value in manifest.items() if key != "sources"}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
