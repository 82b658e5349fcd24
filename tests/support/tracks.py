"""Clips of moving objects for tracking, and a detector that finds in frame n what the clip says."""

import numpy as np
import torch

from deformable_detr.structures import Detections
from tests.support.red_box import RedBoxFinder

SIZE = (480, 640)  # (height, width) in pixels
NAMES = ("green", "red")


def random_clip(seed, frames=120, objects=12, classes=1):
    """Return [(boxes (N, 4) xyxy in pixels, scores, labels), …] of objects that bounce, cross and hide each other.

    An object behind another one is found with a low score or not at all; there are also false detections.
    """
    rng = np.random.default_rng(seed)
    height, width = SIZE
    limits = np.array([width, height])
    sides = rng.uniform(30, 90, (objects, 2))
    corners, steps = rng.uniform(0, 1, (objects, 2)) * (limits - sides), rng.normal(0, 5, (objects, 2))
    labels = rng.integers(0, classes, objects)
    clip = []
    for _ in range(frames):
        corners = corners + steps
        steps = np.where((corners < 0) | (corners + sides > limits), -steps, steps)
        boxes = np.concatenate([corners, corners + sides], axis=1) + rng.normal(0, 1.0, (objects, 4))
        low, high = np.maximum(boxes[:, None, :2], boxes[:, :2]), np.minimum(boxes[:, None, 2:], boxes[:, 2:])
        covered = np.triu((high - low).clip(0).prod(axis=2), k=1).max(axis=1) / sides.prod(axis=1)
        scores = rng.uniform(0.75, 0.98, objects) - 0.9 * covered
        false = np.tile(rng.uniform(0, 400, (2, 2)), 2) + np.array([0, 0, 50, 50])
        boxes, scores = np.concatenate([boxes, false]), np.append(scores, rng.uniform(0.05, 0.8, 2))
        every_label = np.append(labels, rng.integers(0, classes, 2))
        found = (scores > 0.02) & (rng.uniform(size=len(scores)) > 0.03)
        clip.append((boxes[found], scores[found], every_label[found]))
    return clip


def detections(boxes, scores, labels):
    """Return `Detections` in the order of their scores."""
    order = np.argsort(-np.asarray(scores, float), kind="stable")
    boxes, scores, labels = (np.asarray(x)[order] for x in (boxes, scores, labels))
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(labels, dtype=torch.int64) + 10,
        tuple(NAMES[label] for label in labels),
        SIZE,
    )


class ClipDetector(RedBoxFinder):
    """Find the objects of a clip: query i has the i-th one, the other queries have score 0."""

    def __init__(self, clip):
        super().__init__(num_queries=max(len(scores) for _, scores, _ in clip))
        self.clip = iter(clip)

    def forward(self, pixels, padding_mask=None, return_attention=False):
        B, Q, K = len(pixels), self.config.num_queries, self.config.num_classes
        logits, boxes = torch.full((B, Q, K), -20.0), torch.full((B, Q, 4), 0.5)
        for image in range(B):
            corners, scores, labels = next(self.clip)
            unit = torch.tensor(corners / np.array([*SIZE[::-1]] * 2), dtype=torch.float32).reshape(-1, 4)
            boxes[image, : len(unit)] = torch.cat([(unit[:, :2] + unit[:, 2:]) / 2, unit[:, 2:] - unit[:, :2]], dim=1)
            logits[image, torch.arange(len(unit)), torch.tensor(labels)] = torch.logit(torch.tensor(scores).float())
        return {"pred_logits": logits, "pred_boxes": boxes}
