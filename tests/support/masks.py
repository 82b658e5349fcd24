"""Masks without a model that learned them: an ellipse with a hole in each box; and a dataset of polygons."""

import json

import numpy as np
import torch

from deformable_detr.utils.rle import decode_masks, encode_masks
from tests.support.datasets import write_image


def ellipses(boxes, height, width):
    """Return mask logits (N, height, width) of boxes (N, 4) cxcywh in cells of the grid, three cells wide at least."""
    x, y = torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5
    cx, cy, w, h = boxes[:, :, None, None].unbind(1)
    distance = ((x - cx) * 2 / w.clamp(min=3)) ** 2 + ((y - cy) * 2 / h.clamp(min=3)) ** 2
    return torch.minimum(1 - distance, distance - 0.1)


def with_masks(model):
    """Let a detector predict masks at stride 4 of its canvas, in place, and return it."""

    def add_masks(_, inputs, outputs):
        pixels, padding_mask = inputs[:2]
        height, width = pixels.shape[2] // 4, pixels.shape[3] // 4
        valid = ~padding_mask
        content = torch.stack([valid[:, 0].float().mean(1) * width, valid[:, :, 0].float().mean(1) * height], dim=1)
        boxes = outputs["pred_boxes"] * content.repeat(1, 2)[:, None]
        return {**outputs, "pred_masks": torch.stack([ellipses(image, height, width) for image in boxes])}

    model.register_forward_hook(add_masks)
    model.config = model.config.model_copy(update={"masks": True})
    return model


def write_triangles(root, size=(120, 160)):
    """Write a COCO dataset of one image (height, width): a triangle, an RLE, an object without a mask, a crowd.

    Return the masks (2, height, width) of the first two.
    """
    height, width = size
    path = write_image(root / "valid" / "a.png", (width, height))
    rows, columns = np.mgrid[:height, :width] + 0.5
    left, top, side = width / 8, height / 8, height / 2
    triangle = (columns > left) & (rows < top + side) & (columns - left < rows - top)
    square = (columns > width / 2) & (rows > height / 2)
    polygon = [left, top, left + side, top + side, left, top + side]
    shapes = {
        0: {"bbox": [left, top, side, side], "segmentation": [polygon]},
        1: {"bbox": [width / 2, height / 2, width / 2, height / 2], "segmentation": encode_masks(square[None])[0]},
        2: {"bbox": [4, 4, 10, 10]},
        3: {"bbox": [0, 0, 20, 20], "iscrowd": 1, "segmentation": encode_masks(square[None])[0]},
    }
    content = {
        "images": [{"id": 5, "file_name": path.name, "height": height, "width": width}],
        "categories": [{"id": 7, "name": "a"}],
        "annotations": [{"id": number, "image_id": 5, "category_id": 7, **shape} for number, shape in shapes.items()],
    }
    (path.parent / "_annotations.coco.json").write_text(json.dumps(content))
    return np.stack([triangle, square])


def same_shape(rle, mask):
    """Return whether an RLE, of any size, has nearly the shape of a mask (height, width)."""
    height, width = rle["size"]
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for old, new in zip(mask.shape, (height, width), strict=True)
    )
    [decoded], scaled = decode_masks([rle], (height, width)).numpy(), mask[rows][:, columns]
    return (decoded & scaled).sum() > 0.95 * (decoded | scaled).sum()
