"""A stand-in with the detector's interface that finds every red and green rectangle that it can resolve."""

import numpy as np
import torch
from scipy import ndimage

from deformable_detr.config.schema import ModelConfig
from deformable_detr.predict.predictor import Detector

RED, GREEN = (220, 20, 20), (20, 220, 20)


class BlobFinder(Detector):
    """Label 0 is red, 1 green. The score is 0.9, less for small objects; those below 6 input pixels are not found."""

    def __init__(self, **config):
        super().__init__()
        base = {"num_classes": 2, "class_names": ("red", "green"), "category_ids": (5, 9), "image_size": 128}
        self.config = ModelConfig(**{**base, "backbone_weights": "none", "num_queries": 40, **config})
        self.register_buffer("pixel_mean", torch.full((3,), 0.5))
        self.register_buffer("pixel_std", torch.full((3,), 0.25))
        self.input_shapes = []

    def forward(self, pixels, padding_mask=None):
        self.input_shapes.append(tuple(pixels.shape))
        B, Q = len(pixels), self.config.num_queries
        height, width = pixels.shape[2:]
        colors = (pixels * self.pixel_std[:, None, None] + self.pixel_mean[:, None, None]).numpy()
        logits, boxes = torch.full((B, Q, 2), -9.0), torch.full((B, Q, 4), 0.5)
        masks = torch.full((B, Q, height, width), -5.0)
        for image in range(B):
            size = (~padding_mask[image]).any(1).sum().item(), (~padding_mask[image]).any(0).sum().item()
            query = 0
            for label in range(2):
                area = (colors[image, label] > 0.5) & (colors[image, 1 - label] < 0.45)
                labeled = ndimage.label(area)[0]
                for number, (rows, columns) in enumerate(ndimage.find_objects(labeled), start=1):
                    sides = rows.stop - rows.start, columns.stop - columns.start
                    if min(sides) < 6 or query == Q:
                        continue
                    x, y = (columns.start + columns.stop) / 2 / size[1], (rows.start + rows.stop) / 2 / size[0]
                    boxes[image, query] = torch.tensor([x, y, sides[1] / size[1], sides[0] / size[0]])
                    logits[image, query, label] = float(np.log(9)) - 2 / min(sides)
                    masks[image, query][torch.from_numpy(labeled == number)] = 5.0
                    query += 1
        outputs = {"pred_logits": logits, "pred_boxes": boxes}
        return {**outputs, "pred_masks": masks} if self.config.masks else outputs


def paint(height, width, objects):
    """Return a gray image (H, W, 3) uint8 with rectangles (x1, y1, x2, y2), every second one green."""
    image = np.full((height, width, 3), 128, np.uint8)
    for number, (x1, y1, x2, y2) in enumerate(objects):
        image[y1:y2, x1:x2] = GREEN if number % 2 else RED
    return image


def scattered(height, width, count, sides=(8, 24), cell=30, seed=0):
    """Return at most `count` rectangles (N, 4) int that do not touch, at random places."""
    random = np.random.default_rng(seed)
    across = width // cell
    cells = random.permutation(across * (height // cell))[:count]
    corners = np.stack([cells % across, cells // across], 1) * cell
    lengths = random.integers(*sides, (len(cells), 2))
    corners = corners + random.integers(0, cell - 3 - lengths)
    return np.concatenate([corners, corners + lengths], 1)
