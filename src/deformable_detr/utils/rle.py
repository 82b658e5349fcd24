"""Run-length encoded masks in COCO's compressed form: {"size": [height, width], "counts": text}."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Rle = dict[str, Any]


def encode_masks(masks: Tensor | np.ndarray) -> tuple[Rle, ...]:
    """Encode masks (N, H, W), bool or uint8 of 0 and 1."""
    import hotcoco

    array = np.asarray(masks).astype(np.uint8)
    rows: list[Any] = hotcoco.mask.encode(array.transpose(1, 2, 0)) if len(array) else []  # pyright: ignore[reportAssignmentType]
    return tuple({"size": list(row["size"]), "counts": row["counts"].decode("ascii")} for row in rows)


def encode_part(mask: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> Rle:
    """Encode a mask of `size` (height, width) of which only a part (h, w) bool at `corner` (top, left) is not 0."""
    import hotcoco

    (height, width), (top, left) = size, corner
    changes = np.diff(np.pad(mask.T.astype(np.int8), ((0, 0), (1, 1))), axis=1)  # down the columns, as COCO counts
    runs = [(left + column) * height + top + row for column, row in map(np.nonzero, (changes > 0, changes < 0))]
    bounds = np.stack(runs, axis=1).ravel()
    joined = np.flatnonzero(np.diff(bounds) == 0)  # from the bottom of a column to the top of the next
    bounds = np.delete(bounds, [*joined, *(joined + 1)])
    counts = np.diff(bounds, prepend=0, append=height * width).tolist()
    counts = counts[:-1] if counts[-1] == 0 else counts
    row: Any = hotcoco.mask.fr_py_objects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": row["counts"].decode("ascii")}


def unite_masks(rles: Sequence[Mapping[str, Any]]) -> Rle:
    """Return the pixels that any of the masks covers."""
    import hotcoco

    row = hotcoco.mask.merge(hotcoco_rows(rles))
    return {"size": list(row["size"]), "counts": row["counts"].decode("ascii")}


def decode_masks(rles: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> Tensor:
    """Decode masks of images of `size` (height, width) to (N, H, W) bool."""
    import hotcoco

    if not rles:
        return torch.zeros(0, *size, dtype=torch.bool)
    masks = hotcoco.mask.decode(hotcoco_rows(rles))
    return torch.from_numpy(np.ascontiguousarray(masks.transpose(2, 0, 1))).bool()


def hotcoco_rows(rles: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the masks as hotcoco and pycocotools take them, with bytes for counts."""
    return [{"size": list(rle["size"]), "counts": rle["counts"].encode("ascii")} for rle in rles]


def crop_masks(rles: Sequence[Mapping[str, Any]], boxes: Tensor) -> tuple[Rle, ...]:
    """Return the parts of N masks inside their boxes (N, 4), (x1, y1, x2, y2) in pixels."""
    import hotcoco

    cropped = []
    for row, (x1, y1, x2, y2) in zip(hotcoco_rows(rles), boxes.tolist(), strict=True):
        inside = hotcoco.mask.fr_py_objects([[x1, y1, x2 - x1, y2 - y1]], *row["size"])
        counts = hotcoco.mask.merge([row, *inside], True)["counts"].decode("ascii")
        cropped.append({"size": row["size"], "counts": counts})
    return tuple(cropped)


def resize_mask(rle: Mapping[str, Any], size: tuple[int, int]) -> Rle:
    """Return a mask of another `size` (height, width), with the nearest pixels."""
    height, width = rle["size"]
    pixels = decode_masks([rle], (height, width))[0].numpy()
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for old, new in zip(pixels.shape, size, strict=True)
    )
    return encode_masks(pixels[rows][:, columns][None])[0]


def thumbnail(
    mask: Mapping[str, Any] | Sequence[Any], longest_side: int, image_size: Sequence[int] | None = None
) -> Rle:
    """Return the mask of an image that is downscaled if a side is longer than `longest_side` pixels.

    Args:
        mask: An RLE, or flat polygons [x, y, x, y, …] in pixels.
        longest_side: Limit for height and width.
        image_size: (height, width) of the image; an RLE has its own.
    """
    import hotcoco

    size = mask["size"] if isinstance(mask, Mapping) else image_size
    assert size is not None
    scale = min(1.0, longest_side / max(size))
    height, width = (max(1, round(side * scale)) for side in size)
    if not isinstance(mask, Mapping):
        polygons = [(np.asarray(polygon) * scale).tolist() for polygon in mask]
        row = hotcoco.mask.merge(hotcoco.mask.fr_py_objects(polygons, height, width))
        return {"size": [height, width], "counts": row["counts"].decode("ascii")}
    return resize_mask(mask, (height, width))
