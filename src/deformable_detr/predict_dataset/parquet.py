"""What comes out: Parquet files, a row an image."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..structures import Detections
from .filesystem import Store

ROWS = 256  # of a row group
_RUN, _IMAGES, _BAD = b"deformable_detr.run", b"deformable_detr.images", b"deformable_detr.bad"
_PART = re.compile(r"part-(\d{6,})\.parquet")


class Counts(NamedTuple):
    """Images, and how many of them could not be read."""

    images: int = 0
    bad: int = 0


def schema() -> Any:
    """The columns; boxes and what belongs to them are null where the image could not be read, best score first."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("image", pa.string(), nullable=False),  # path or URL, in shards with "#" and member or row
            pa.field("key", pa.string()),  # the sample's name in a WebDataset, or --id-column of Parquet
            pa.field("width", pa.int32()),  # pixels, upright as EXIF says
            pa.field("height", pa.int32()),
            pa.field("boxes", pa.list_(pa.list_(pa.float32()))),  # x1, y1, x2, y2 in pixels
            pa.field("scores", pa.list_(pa.float32())),
            pa.field("labels", pa.list_(pa.int32())),  # 0 … classes − 1
            pa.field("category_ids", pa.list_(pa.int64())),  # the data set's own ids of the labels
            pa.field("names", pa.list_(pa.string())),
            pa.field("error", pa.string()),  # why the image could not be read; null where it could
        ]
    )


def row(image: str, key: str | None, found: Detections | str) -> dict[str, Any]:
    """A row of what was found, or of what is wrong with the image. Names that are no text get \\udc80 and the like."""
    image, key = _text(image), None if key is None else _text(key)
    if isinstance(found, str):
        return {"image": image, "key": key, "error": _text(found)}
    height, width = found.image_size
    return {
        "image": image, "key": key, "width": width, "height": height, "boxes": found.boxes.tolist(),
        "scores": found.scores.tolist(), "labels": found.labels.tolist(), "category_ids": found.category_ids.tolist(),
        "names": list(found.names), "error": None,
    }  # fmt: skip


def _text(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def part_name(unit: int) -> str:
    """The file of a unit."""
    return f"part-{unit:06d}.parquet"


def part_unit(name: str) -> int | None:
    """The unit of a file; none: it is no part."""
    match = _PART.fullmatch(name)
    return int(match[1]) if match else None


def write_part(store: Store, unit: int, run: str, rows: Iterable[Mapping[str, Any]]) -> Counts:
    """Writes the rows as they come, in groups, and puts the file in place after the last one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = bad = 0

    def write(path: Path) -> None:
        nonlocal images, bad
        columns = schema()
        with pq.ParquetWriter(path, columns, compression="zstd") as writer:
            waiting: list[Mapping[str, Any]] = []
            for record in rows:
                images += 1
                bad += record["error"] is not None
                waiting.append(record)
                if len(waiting) == ROWS:
                    writer.write_table(pa.Table.from_pylist(waiting, columns))
                    waiting = []
            if waiting:
                writer.write_table(pa.Table.from_pylist(waiting, columns))
            writer.add_key_value_metadata({_RUN: run, _IMAGES: str(images), _BAD: str(bad)})

    store.put(part_name(unit), write)
    return Counts(images, bad)


def read_part(store: Store, unit: int) -> tuple[str, Counts] | None:
    """The run that a part is of and its counts; none: it is damaged or no part.

    Raises OSError where the storage fails: what cannot be read just now is not damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with store.open(part_name(unit)) as file:
            said = pq.read_metadata(file).metadata or {}
        return said[_RUN].decode(), Counts(int(said[_IMAGES]), int(said[_BAD]))
    except (pa.ArrowInvalid, KeyError, ValueError):
        return None
    except OSError as error:
        if error.errno is None or isinstance(error, FileNotFoundError):  # Arrow's own word for broken bytes
            return None
        raise
