"""A dataset of plain images of many shapes, with `sizes` as in `CocoDataset`."""

import numpy as np
import torch

from deformable_detr.structures import Target


def target(*boxes):
    return Target(torch.zeros(len(boxes), dtype=torch.int64), torch.tensor(boxes).reshape(-1, 4), 7, (100, 100))


class PlainImages(torch.utils.data.Dataset):
    """Image i has the gray level i and one box."""

    def __init__(self, length=300, transform=None, seed=0):
        random = np.random.default_rng(seed)
        self.sizes = random.integers(40, 200, (length, 2))
        self.transform = transform

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return self.finish(*self.load(index))

    def finish(self, *sample):
        return self.transform(*sample) if self.transform else sample

    def load(self, index):
        height, width = self.sizes[index].tolist()
        image = torch.full((3, height, width), index % 256, dtype=torch.uint8)
        return image, target([0.5, 0.5, 0.3, 0.3])

    def draw(self, count, generator):
        return torch.randint(len(self), (count,), generator=generator).tolist()
