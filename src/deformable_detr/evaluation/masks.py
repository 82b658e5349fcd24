"""Masks of ground truth and detections, as hotcoco needs them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..utils.errors import UserError

Size = tuple[int, int]  # (height, width)
Record = Mapping[str, Any]


def has_mask(annotation: Record) -> bool:
    """Return whether an annotation has an RLE or a polygon of three or more points."""
    shape = annotation.get("segmentation")
    return bool(shape) and (isinstance(shape, Mapping) or any(len(part) >= 6 for part in shape))


def mask_sizes(images: Iterable[Record], annotations: Sequence[Record], results: Sequence[Record]) -> dict[Any, Size]:
    """Return the size of each image by id.

    Detected masks have the size of the file, which its record may lack or state wrongly.
    """
    sizes: dict[Any, Size] = {}
    for row in (*results, *annotations):
        if isinstance(shape := row.get("segmentation"), Mapping) and shape:
            sizes.setdefault(row["image_id"], _size(shape))
    detected = {row["image_id"] for row in results}
    for image in images:
        if image["id"] not in detected and image.get("height") and image.get("width"):
            sizes[image["id"]] = int(image["height"]), int(image["width"])
    return sizes


def object_masks(annotations: Sequence[Record], sizes: Mapping[Any, Size]) -> tuple[list[Any], np.ndarray]:
    """Return the masks of annotations and which (N,) bool have none; these get their box as a polygon.

    Raises UserError about an RLE that is damaged or of another size than its image.
    """
    without = np.array([not has_mask(annotation) for annotation in annotations], dtype=bool)
    shapes, rles = [], {}
    for index, (annotation, boxed) in enumerate(zip(annotations, without, strict=True)):
        shape = annotation.get("segmentation")
        if boxed:
            x, y, width, height = annotation["bbox"]
            shape = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        elif isinstance(shape, Mapping):
            rles[f"ground truth: annotation {annotation.get('id', f'number {index}')}"] = annotation
        shapes.append(shape)
    _areas(rles, sizes)
    return shapes, without


def detected_masks(results: Sequence[Record], sizes: Mapping[Any, Size]) -> tuple[list[Any], np.ndarray]:
    """Return the RLEs of results and their areas in pixels (N,).

    Raises UserError about one that is missing, damaged or of another size than its image.
    """
    for index, result in enumerate(results):
        if not isinstance(result.get("segmentation"), Mapping):
            raise UserError(f"detection number {index} has no mask; give its segmentation as an RLE")
    areas = _areas({f"detection number {index}": result for index, result in enumerate(results)}, sizes)
    return [dict(result["segmentation"]) for result in results], areas


def _areas(records: Mapping[str, Record], sizes: Mapping[Any, Size]) -> np.ndarray:
    """Return the areas of records' RLEs; the keys name the records in errors."""
    import hotcoco

    rles = []
    for where, record in records.items():
        rle, size = dict(record["segmentation"]), sizes[record["image_id"]]
        if _size(rle) != size:
            height, width = _size(rle)
            raise UserError(f"{where}: its mask has {height}×{width} pixels, but the image has {size[0]}×{size[1]}")
        rles.append(rle)
    try:
        return np.asarray(hotcoco.mask.area(rles), dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        for where, rle in zip(records, rles, strict=True):
            try:
                hotcoco.mask.area(rle)
            except (TypeError, ValueError) as error:
                raise UserError(f"{where}: its mask is damaged: {error}") from None
        raise


def _size(rle: Record) -> Size:
    height, width = rle["size"]
    return int(height), int(width)
