"""Contrastive denoising: noisy copies of the objects as additional queries (DN-DETR, section 4; DINO, section 3.3).

Dimensions: B images, N objects of the whole batch, X denoising queries per image, Q queries of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..config.schema import TrainConfig
from ..model.decoder import DenoisingQueries
from .matcher import Matches, PackedTargets


class Denoising(nn.Module):
    """Make denoising queries from the objects of a batch. Its class embedding is trained but not part of the model.

    A group holds two queries per object: a positive one with little noise, which must recover the object, and a
    negative one with more noise, which must predict background. No query attends to the queries of another group, and
    the model's own queries attend to none of them.
    """

    def __init__(self, config: TrainConfig, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_denoising = config.num_denoising
        self.box_noise, self.label_noise = config.box_noise, config.label_noise
        self.classes = nn.Embedding(num_classes, dim)

    def forward(
        self, targets: PackedTargets, num_queries: int, max_objects: int, rng: BatchConsistentRng | None = None
    ) -> tuple[DenoisingQueries | None, tuple[Matches, int] | None]:
        """Return the queries, and the (1, pairs) matches of the positive ones with the number of groups.

        Both are None if `max_objects`, the most objects of an image in the whole step, is 0. `num_queries` counts the
        model's own queries. The noise comes from `rng`, by default PyTorch's global generator.
        """
        device = self.classes.weight.device
        if not max_objects:
            return None, None
        groups = max(1, self.num_denoising // (2 * max_objects))
        # On the host: its generator is the one that a resumed run restores.
        targets, rng = targets.to("cpu"), rng or BatchConsistentRng()
        image, batch_size = targets.image, len(targets.host_counts)
        position = torch.arange(len(image)) - (targets.counts.cumsum(0) - targets.counts)[image]  # inside its image
        labels = torch.zeros(batch_size, max_objects, dtype=torch.long)
        boxes = torch.full((batch_size, max_objects, 4), 0.5)
        filled = torch.zeros(batch_size, max_objects, dtype=torch.bool)
        labels[image, position], boxes[image, position] = targets.labels, targets.boxes.to(boxes.dtype)
        filled[image, position] = True

        copies = 2 * groups  # positive and negative alternate
        negative = (torch.arange(copies * max_objects) // max_objects % 2).bool()
        labels = noisy_labels(labels.repeat(1, copies), len(self.classes.weight), self.label_noise, rng)
        boxes = noisy_boxes(boxes.repeat(1, copies, 1), negative, self.box_noise, rng)

        query = torch.arange(groups)[:, None] * 2 * max_objects + position  # (groups, N)
        indices = (image.expand_as(query), query, torch.arange(len(image)).expand_as(query))
        matches = Matches(*(index.reshape(1, -1).to(device, non_blocking=True) for index in indices))

        content = self.classes(labels.to(device)) * filled.repeat(1, copies).to(device)[..., None]
        attn_mask = group_attn_mask(groups, 2 * max_objects, num_queries)
        return DenoisingQueries(content, boxes.to(device), attn_mask.to(device)), (matches, groups)


class BatchConsistentRng:
    """Random numbers for some images of a step, the same for any division of the step into passes and processes.

    With a seed, numbers are drawn for all `images` of the step, and these images, from index `first` on, take theirs.
    Without one, they come from PyTorch's global generator.
    """

    def __init__(self, images: int = 0, first: int = 0, seed: int | None = None) -> None:
        self.images, self.first = images, first
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def uniform(self, shape: torch.Size) -> Tensor:
        """Return numbers in 0..1; the first dimension of `shape` is the images."""
        return self._draw(torch.rand, shape)

    def integers(self, high: int, shape: torch.Size) -> Tensor:
        """Return integers in 0..high − 1; the first dimension of `shape` is the images."""
        return self._draw(partial(torch.randint, high), shape)

    def _draw(self, sample: Callable[..., Tensor], shape: torch.Size) -> Tensor:
        if self.generator is None:
            return sample(shape)
        first = min(self.first, self.images - shape[0])  # a process without images computes a placeholder
        return sample((self.images, *shape[1:]), generator=self.generator)[first : first + shape[0]]


def noisy_labels(labels: Tensor, num_classes: int, noise: float, rng: BatchConsistentRng) -> Tensor:
    """Redraw the fraction noise / 2 of the labels (B, X) from all classes (DN-DETR, section 4.2)."""
    redrawn = rng.uniform(labels.shape) < noise / 2
    return torch.where(redrawn, rng.integers(num_classes, labels.shape), labels)


def noisy_boxes(boxes: Tensor, negative: Tensor, noise: float, rng: BatchConsistentRng) -> Tensor:
    """Move each side of the boxes by up to noise × half its length; by 1 to 2 times that for negative ones.

    boxes: (B, X, 4) cxcywh in 0..1; negative: (X,) bool. Returns boxes inside the image.
    """
    from torchvision.ops import box_convert

    half = boxes[..., 2:].repeat(1, 1, 2) / 2
    amount = (rng.uniform(boxes.shape) + negative[:, None]) * noise
    sign = rng.integers(2, boxes.shape) * 2 - 1
    corners = (box_convert(boxes, "cxcywh", "xyxy") + sign * amount * half).clamp(0, 1)
    low, high = torch.minimum(corners[..., :2], corners[..., 2:]), torch.maximum(corners[..., :2], corners[..., 2:])
    return box_convert(torch.cat((low, high), dim=-1), "xyxy", "cxcywh")


def group_attn_mask(groups: int, size: int, num_queries: int) -> Tensor:
    """Return the (X + Q, X + Q) bool self-attention mask, True = blocked; the X = groups × size come first."""
    num_denoising = groups * size
    group = torch.arange(num_denoising + num_queries) // size
    group[num_denoising:] = groups
    same_group, model_query = group[:, None] == group, group == groups
    return ~(same_group | model_query)
