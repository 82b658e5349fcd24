"""Contrastive query denoising: noisy copies of the objects as extra queries (DN-DETR, section 4; DINO, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config.schema import TrainConfig
from ..model.decoder import DenoisingQueries
from ..structures import Target
from .matcher import Matches


class Denoising(nn.Module):
    """Makes extra queries from the objects of a batch. It learns a vector a class and is no part of the model.

    A group holds two queries an object: one a little off, which should find the object again, and one further off,
    which should say that there is nothing. Groups do not see each other, the model's own queries do not see them.
    """

    def __init__(self, config: TrainConfig, num_classes: int, dim: int) -> None:
        super().__init__()
        self.budget, self.box_noise, self.label_noise = config.num_denoising, config.box_noise, config.label_noise
        self.classes = nn.Embedding(num_classes, dim)

    def forward(
        self,
        targets: Sequence[Target],
        num_queries: int,
        most: int | None = None,
        noise: BatchConsistentRng | None = None,
    ) -> tuple[DenoisingQueries, Matches, int] | None:
        """The queries, which object each of the first kind belongs to, and the number of groups; none without objects.

        num_queries: how many queries the model has of its own. The matches are those of one layer, (1, M); objects
        count through the batch as in `PackedTargets`.
        most, noise: where the targets are part of a larger batch: the most objects that any of its images has, which
        decides the number of groups, and the random numbers of this part; none: the targets are all there is.
        """
        device = self.classes.weight.device
        sizes = [len(target.labels) for target in targets]
        most = max(sizes, default=0) if most is None else most
        noise = noise or BatchConsistentRng()
        if not most:
            return None
        groups = max(1, self.budget // (2 * most))
        # On the host: the objects are there anyway, and its random numbers are the ones that a resumed run repeats.
        labels = torch.zeros(len(targets), most, dtype=torch.long)
        boxes = torch.full((len(targets), most, 4), 0.5)
        for image, target in enumerate(targets):
            labels[image, : sizes[image]] = target.labels.cpu()
            boxes[image, : sizes[image]] = target.boxes.cpu().float()
        real = torch.arange(most) < torch.tensor(sizes)[:, None]  # (B, most); the rest fills up the rows

        kinds = 2 * groups  # near and far by turns
        labels, boxes = labels.repeat(1, kinds), boxes.repeat(1, kinds, 1)
        far = (torch.arange(kinds * most) // most % 2).bool()
        labels = noisy_labels(labels, len(self.classes.weight), self.label_noise, noise)
        boxes = noisy_boxes(boxes, far, self.box_noise, noise)
        filled = real.repeat(1, kinds)

        first = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        near = torch.arange(groups)[:, None, None] * 2 * most + torch.arange(most)  # (groups, 1, most)
        image, place = real.nonzero(as_tuple=True)
        query = near.expand(-1, len(targets), -1)[:, image, place]  # (groups, objects)
        pairs = [image.expand_as(query), query, (first[image] + place).expand_as(query)]
        matches = Matches(*(pair.reshape(1, -1).to(device, non_blocking=True) for pair in pairs))

        content = self.classes(labels.to(device)) * filled.to(device)[..., None]
        mask = group_mask(groups, 2 * most, num_queries)
        return DenoisingQueries(content, boxes.to(device), mask.to(device)), matches, groups


class BatchConsistentRng:
    """Random numbers for `count` images of a batch of `images`, of which `first` is theirs first.

    With a seed, they are the same however the batch is divided: numbers are drawn for all of it, and these images take
    theirs. Without one they come from PyTorch's own generator.
    """

    def __init__(self, images: int = 0, first: int = 0, seed: int | None = None) -> None:
        self.images, self.first = images, first
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def uniform(self, shape: torch.Size) -> Tensor:
        """0..1; shape begins with the number of images."""
        if self.generator is None:
            return torch.rand(shape)
        return self._mine(torch.rand((self.images, *shape[1:]), generator=self.generator), shape)

    def whole(self, high: int, shape: torch.Size) -> Tensor:
        """Whole numbers in 0..high − 1."""
        if self.generator is None:
            return torch.randint(high, shape)
        return self._mine(torch.randint(high, (self.images, *shape[1:]), generator=self.generator), shape)

    def _mine(self, numbers: Tensor, shape: torch.Size) -> Tensor:
        first = min(self.first, self.images - shape[0])  # a process without images makes one up
        return numbers[first : first + shape[0]]


def noisy_labels(labels: Tensor, num_classes: int, part: float, noise: BatchConsistentRng | None = None) -> Tensor:
    """Labels (B, N) of which part / 2 is drawn anew from all classes (DN-DETR, section 4.2)."""
    noise = noise or BatchConsistentRng()
    redrawn = noise.uniform(labels.shape) < part / 2
    return torch.where(redrawn, noise.whole(num_classes, labels.shape), labels)


def noisy_boxes(boxes: Tensor, far: Tensor, size: float, noise: BatchConsistentRng | None = None) -> Tensor:
    """Boxes whose sides moved: each by up to size × half the side's length, twice that and at least once where far.

    boxes: (B, N, 4) cxcywh in 0..1; far: (N,) bool. Returns boxes inside the image.
    """
    from torchvision.ops import box_convert

    noise = noise or BatchConsistentRng()
    half = boxes[..., 2:].repeat(1, 1, 2) / 2
    amount = (noise.uniform(boxes.shape) + far[:, None]) * size
    sign = noise.whole(2, boxes.shape) * 2 - 1
    corners = (box_convert(boxes, "cxcywh", "xyxy") + sign * amount * half).clamp(0, 1)
    low, high = torch.minimum(corners[..., :2], corners[..., 2:]), torch.maximum(corners[..., :2], corners[..., 2:])
    return box_convert(torch.cat((low, high), dim=-1), "xyxy", "cxcywh")


def group_mask(groups: int, size: int, num_queries: int) -> Tensor:
    """(N + Q, N + Q) bool, True = unseen: N = groups × size extra queries first, then the model's own."""
    extra = groups * size
    group = torch.arange(extra + num_queries) // size
    group[extra:] = groups
    same, own = group[:, None] == group, group == groups
    return ~(same | own)
