"""labelme: a JSON file with the shapes of one image."""

import base64
import io
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ..utils.errors import UserError
from .annotation_files import MAX_OTHERS, Collector, FileSource, extent, head_of, read_json
from .discovery import ImageFolder, is_hidden, split_aliases, walk_folder
from .matching import IMAGE_SUFFIXES
from .segmentation import Segmentation, ellipse_of, polygon_of, window_mask


class LabelmeSource(FileSource):
    """One split of a labelme dataset; see `FileSource`. The files may be beside the images or in folders."""

    format: ClassVar[str] = "labelme"
    per_image: ClassVar[bool] = True

    @classmethod
    def accepts(cls, path: Path) -> bool:
        head = head_of(path) if path.suffix.lower() == ".json" else ""
        return head.lstrip().startswith("{") and any(f'"{key}"' in head for key in ("shapes", "imagePath", "imageData"))

    @classmethod
    def files_in(cls, folder: Path) -> list[Path]:
        """Return all JSON files below a folder if one of the first is labelme's."""
        paths = (path for path in walk_folder(folder) if path.suffix.lower() == ".json" and path.is_file())
        files = sorted(path for path in paths if not is_hidden(path.relative_to(folder)))
        return files if any(map(cls.accepts, files[:MAX_OTHERS])) else []

    def read_file(self, path: Path, split: Collector) -> None:
        content = read_json(path)
        shapes = content.get("shapes") if isinstance(content, dict) else None
        if not isinstance(shapes, list):
            raise UserError(f"{path}: is not a labelme file: it has no list 'shapes'; move it elsewhere")
        name = self._image_name(path, content.get("imagePath"))
        image_id = split.image(name, content.get("imageHeight"), content.get("imageWidth"))
        for index, shape in enumerate(shapes):
            shape = shape if isinstance(shape, dict) else {}
            box = shape_extent(shape)
            size = (content.get("imageHeight"), content.get("imageWidth"))
            mask = shape_mask(shape, box, size) if split.masks and box else None
            split.add(image_id, shape.get("label"), box, path, f"shapes[{index}]", mask)

    def find_images(self, names: Sequence[str]) -> ImageFolder:
        """Find the images; say so if they are only inside the files."""
        folder = super().find_images(names)
        if all(folder.missing.values()) or not isinstance(read_json(self.files[0]).get("imageData"), str):
            return folder
        return replace(folder, hint="the JSON files have the images inside (imageData): write them as files beside")

    def _image_name(self, path: Path, text: Any) -> str:
        """Return the image of a file, relative to `image_root`. `imagePath` is relative to the file, often outdated."""
        folder = os.path.relpath(path.parent, self.image_root)
        text = text.replace("\\", "/") if isinstance(text, str) else ""
        image = os.path.normpath(os.path.join(path.parent, text))
        if text and os.path.isfile(image):
            relative = os.path.relpath(image, self.image_root)
            beside = os.path.basename(os.path.dirname(image)).lower() in ("images", *split_aliases(self.split))
            return os.path.basename(text) if relative.startswith("..") and beside else relative
        beside = (f"{path.stem}{suffix}" for suffix in sorted(IMAGE_SUFFIXES))
        name = next((name for name in beside if (path.parent / name).is_file()), os.path.basename(text) or path.stem)
        return os.path.normpath(os.path.join(folder, name))


def shape_extent(shape: dict[str, Any]) -> list[float] | None:
    """Return the xywh box around a shape, None if its points are not valid."""
    points = shape.get("points")
    box = extent(points)
    if box is None or not isinstance(points, list):
        return None
    if shape.get("shape_type") == "circle" and len(points) == 2:  # the center and a point on the circle
        (x, y), radius = map(float, points[0][:2]), math.dist(*(tuple(map(float, point[:2])) for point in points))
        return [x - radius, y - radius, 2 * radius, 2 * radius]
    if shape.get("shape_type") == "mask":  # its first and last pixel
        return [*box[:2], box[2] + 1, box[3] + 1]
    return box


def shape_mask(shape: dict[str, Any], box: Sequence[float], size: tuple[Any, Any]) -> Segmentation | None:
    """Return the mask of a shape in an image of `size` (height, width), None for a box, a line or a point.

    A mask is a PNG (in base64) at the first point of its box.
    """
    x, y, w, h = box
    kind = shape.get("shape_type")
    if kind in (None, "", "polygon"):
        return polygon_of(shape["points"])
    if kind == "circle":
        return ellipse_of((x + w / 2, y + h / 2), (w / 2, h / 2))
    if kind != "mask" or not all(type(side) is int and side > 0 for side in size):
        return None
    try:
        pixels: Any = np.asarray(Image.open(io.BytesIO(base64.b64decode(shape["mask"]))))
    except (KeyError, TypeError, ValueError, OSError):  # binascii.Error is a ValueError
        return None
    return window_mask(pixels.reshape(*pixels.shape[:2], -1).any(axis=2), round(x), round(y), size)
