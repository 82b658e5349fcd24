"""The output: Parquet files with one row per image."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..structures import Detections
from ..utils.errors import UserError
from .filesystem import OutputFolder

ROW_GROUP_SIZE = 256
_RUN, _IMAGES, _UNREADABLE = (f"deformable_detr.{key}".encode() for key in ("run", "images", "unreadable"))
_NOTE = b"deformable_detr.manifest"
_SHA256, _UNSEALED = b"deformable_detr.sha256", b"0" * 64
_SEAL = re.compile(re.escape(_SHA256) + rb".{1,8}?([0-9a-f]{64})", re.DOTALL)  # the key and its value in the footer
_PART = re.compile(r"part-(\d{6,})\.parquet")


class ImageCounts(NamedTuple):
    """The number of images, and of those that could not be read."""

    images: int = 0
    unreadable: int = 0


def schema(masks: bool = False) -> Any:
    """Return the columns. If an image could not be read, only `image`, `key` and `error` are set.

    masks: Whether there is a column with COCO's RLE, from a model with masks.
    """
    import pyarrow as pa

    rle = pa.struct([pa.field("size", pa.list_(pa.int32())), pa.field("counts", pa.string())])
    return pa.schema(
        [
            pa.field("image", pa.string(), nullable=False),  # path or URL; in shards with "#" and member or row
            pa.field("key", pa.string()),  # sample name in WebDataset, --id-column of Parquet
            pa.field("width", pa.int32()),  # pixels, EXIF orientation applied
            pa.field("height", pa.int32()),
            pa.field("boxes", pa.list_(pa.list_(pa.float32()))),  # x1, y1, x2, y2 in pixels, best score first
            pa.field("scores", pa.list_(pa.float32())),
            pa.field("labels", pa.list_(pa.int32())),  # 0..num_classes − 1
            pa.field("category_ids", pa.list_(pa.int64())),  # the dataset's ids of the labels
            pa.field("names", pa.list_(pa.string())),
            *([pa.field("masks", pa.list_(rle))] if masks else []),  # size: height, width
            pa.field("error", pa.string()),  # why the image could not be read
        ]
    )


def result_row(image: str, key: str | None, result: Detections | str) -> dict[str, Any]:
    """Return the row of an image. `result` is its detections, or the error. Undecodable names become \\udc80 etc."""
    image, key = _to_text(image), None if key is None else _to_text(key)
    if isinstance(result, str):
        return {"image": image, "key": key, "error": _to_text(result)}
    height, width = result.image_size
    masks = {} if result.segmentations is None else {"masks": list(result.segmentations)}
    return {
        "image": image, "key": key, "width": width, "height": height, "boxes": result.boxes.tolist(),
        "scores": result.scores.tolist(), "labels": result.labels.tolist(),
        "category_ids": result.category_ids.tolist(), "names": list(result.names), **masks, "error": None,
    }  # fmt: skip


def _to_text(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def part_name(unit: int) -> str:
    """Return the file name of a unit."""
    return f"part-{unit:06d}.parquet"


def unit_of_part(name: str) -> int | None:
    """Return the unit of a file name; None: the file is not a part."""
    match = _PART.fullmatch(name)
    return int(match[1]) if match else None


def write_part(
    out: OutputFolder, unit: int, run_id: str, rows: Iterable[Mapping[str, Any]], masks: bool = False
) -> ImageCounts:
    """Write the rows of a unit as they arrive, with a column of masks or not; the file appears after the last one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images, unreadable, remaining = 0, 0, iter(rows)

    def write(path: Path) -> None:
        nonlocal images, unreadable
        columns = schema(masks)
        with pq.ParquetWriter(path, columns, compression="zstd") as writer:
            while group := list(islice(remaining, ROW_GROUP_SIZE)):
                images += len(group)
                unreadable += sum(row["error"] is not None for row in group)
                writer.write_table(pa.Table.from_pylist(group, columns))
            counts = {_IMAGES: str(images), _UNREADABLE: str(unreadable)}
            writer.add_key_value_metadata({_RUN: run_id, **counts, _SHA256: _UNSEALED})
        content = path.read_bytes()
        path.write_bytes(_with_seal(content, hashlib.sha256(content).hexdigest().encode()))

    out.write(part_name(unit), write)
    return ImageCounts(images, unreadable)


def _with_seal(content: bytes, seal: bytes) -> bytes:
    """Return the file with another checksum in its footer, which is that of the file with `_UNSEALED` in this place."""
    *_, place = _SEAL.finditer(content)
    return content[: place.start(1)] + seal + content[place.end(1) :]


def _is_intact(content: bytes) -> bool:
    seals = _SEAL.findall(content)
    return bool(seals) and seals[-1] == hashlib.sha256(_with_seal(content, _UNSEALED)).hexdigest().encode()


def read_part(out: OutputFolder, unit: int) -> tuple[str, ImageCounts] | None:
    """Return the run id and the counts of a part; None: it is missing or damaged. Only local files are read in full.

    Raises UserError if the storage fails, so that the file may be intact.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with out.open(part_name(unit)) as file:
            if out.local and not _is_intact(file.read()):
                return None
            metadata = pq.read_metadata(file).metadata or {}
        return metadata[_RUN].decode(), ImageCounts(int(metadata[_IMAGES]), int(metadata[_UNREADABLE]))
    except (pa.ArrowInvalid, KeyError, ValueError):
        return None
    except OSError as error:
        if error.errno is None or isinstance(error, FileNotFoundError):  # Arrow reports broken bytes without errno
            return None
        problem = f"{out.path(part_name(unit))} cannot be read: {error.strerror or error}"
        raise UserError(f"{problem}; run again when the storage works") from None


def write_note(out: OutputFolder, name: str, text: str, masks: bool = False) -> None:
    """Write a table of the same columns without rows that has a text in its footer."""
    import pyarrow.parquet as pq

    table = schema(masks).with_metadata({_NOTE: text}).empty_table()
    out.write(name, lambda path: pq.write_table(table, path))


def read_note(file: Any) -> bytes:
    """Return the text that `write_note` wrote. Raises ValueError, KeyError or TypeError if the file is damaged."""
    import pyarrow.parquet as pq

    return pq.read_metadata(file).metadata[_NOTE]
