"""Steps: how they are divided among processes and passes, and how images of like size come together."""

import numpy as np
import pytest
import torch

from deformable_detr.config.schema import DataConfig
from deformable_detr.data.dataloader import POOL, Key, StepSampler, loader
from deformable_detr.data.mosaic import Mosaics, mosaic
from deformable_detr.data.transforms import Training, least_visible, training
from deformable_detr.structures import Target


def target(*boxes):
    return Target(torch.zeros(len(boxes), dtype=torch.int64), torch.tensor(boxes).reshape(-1, 4), 7, (100, 100))


class Pictures(torch.utils.data.Dataset):
    """Images of many shapes, as a `CocoDataset` has them."""

    def __init__(self, length=300, transform=None, seed=0):
        random = np.random.default_rng(seed)
        self.sizes = random.integers(40, 200, (length, 2))
        self.transform = transform

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        height, width = self.sizes[index].tolist()
        image = torch.full((3, height, width), index % 256, dtype=torch.uint8)
        sample = image, target([0.5, 0.5, 0.3, 0.3])
        return self.transform(*sample) if self.transform else sample


def indices(sampler):
    return [[key.index for key in batch] for batch in sampler]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("effective", [None, 4, 6, 11])
def test_every_image_is_seen_once_by_one_process(size, effective):
    samplers = [StepSampler(23, 2, True, 0, effective=effective, process=(rank, size)) for rank in range(size)]
    batches = [indices(sampler) for sampler in samplers]
    assert sorted(index for own in batches for batch in own for index in batch) == list(range(23))
    assert len({len(own) for own in batches}) == 1, "all have equally many passes"
    assert max(len(batch) for own in batches for batch in own) <= 2
    assert len(batches[0]) == len(samplers[0]) == sum(samplers[0].passes(step) for step in range(samplers[0].steps))


def test_steps_are_the_same_images_in_any_number_of_processes():
    def steps(size, batch_size):
        samplers = [StepSampler(22, batch_size, True, 3, effective=8, process=(rank, size)) for rank in range(size)]
        found = [[] for _ in range(samplers[0].steps)]
        for sampler in samplers:
            batches = iter(indices(sampler))
            for step, seen in enumerate(found):
                seen.extend(index for _ in range(sampler.passes(step)) for index in next(batches))
        return [sorted(seen) for seen in found]

    assert steps(1, 8) == steps(1, 3) == steps(2, 4) == steps(3, 1)


def test_an_epoch_goes_on_anywhere():
    for measure in (None, lambda key: (1 + key.index % 7, 1 + key.index % 11)):
        sampler = StepSampler(200, 2, True, 5, effective=4, measure=measure)
        sampler.set_epoch(2)
        whole = indices(sampler)
        for skip in (1, POOL, POOL + 3):
            sampler.set_epoch(2, skip=skip)
            assert indices(sampler) == whole[2 * skip :]
        sampler.set_epoch(2, skip=1, stride=3)
        assert indices(sampler)[:2] == whole[2:4]


def padding(batches):
    return 1 - sum(float((~images.padding_mask).sum()) for images, _ in batches) / sum(
        images.padding_mask.numel() for images, _ in batches
    )


def test_buckets_have_less_padding_and_all_images():
    data = Pictures(transform=training(64, 128, DataConfig()))
    plain, bucketed = (
        list(loader(data, 4, 0, True, 0, aspect_ratio_grouping=aspect_ratio_grouping))
        for aspect_ratio_grouping in (False, True)
    )
    assert padding(bucketed) < 0.5 * padding(plain)
    assert [len(images) for images, _ in bucketed] == [len(images) for images, _ in plain]
    again = list(loader(data, 4, 0, True, 0, aspect_ratio_grouping=True))
    assert all(torch.equal(a[0].pixels, b[0].pixels) for a, b in zip(bucketed, again, strict=True))


def test_the_size_of_a_sample_is_known_beforehand():
    data = Pictures(40, transform=training(64, 128, DataConfig()))
    batches = loader(data, 1, 0, True, 0, aspect_ratio_grouping=True)
    measure = batches.sampler.measure
    for keys, (images, _) in zip(batches.sampler, batches, strict=True):
        assert measure(keys[0]) == images.pixels.shape[-2:]
    assert measure(Key(0, 3)) != measure(Key(1, 3)), "another epoch, other choices"


def test_a_crop_that_spares_objects():
    whole = target([0.5, 0.5, 0.2, 0.2])  # 40..60 of 100
    corner = target([0.25, 0.25, 0.3, 0.3])
    assert least_visible(whole, (40, 40, 20, 20), 100, 100) == pytest.approx(1.0)
    assert least_visible(whole, (50, 40, 50, 50), 100, 100) == pytest.approx(0.5)
    assert least_visible(whole, (70, 70, 20, 20), 100, 100) == 1.0
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    areas = {}
    for visible in (0.0, 0.7):
        torch.manual_seed(0)
        crops = Training(100, 200, crop=1.0, flip=0.0, visible=visible)
        cut = []
        for _ in range(60):
            moved = crops.choose(100, 100)
            part = crops._moved(moved.part, corner, moved.before, moved.before)
            cut.append(least_visible(corner, part, moved.before, moved.before) < 0.7)
        areas[visible] = sum(cut)
        assert crops(image, corner)[0].shape[0] == 3
    assert areas[0.7] < areas[0.0] / 4


def test_a_mosaic_shows_all_four_and_their_objects():
    images = [torch.full((3, 40 + 10 * n, 60), 50 * n, dtype=torch.uint8) for n in range(4)]
    samples = [(image, target([0.5, 0.5, 1.0, 1.0])) for image in images]
    picture, merged = mosaic(samples, (100, 120), [0.5, 0.5])
    assert picture.shape == (3, 100, 120)
    assert len(merged.labels) == 4
    for number, (cx, cy, w, h) in enumerate(merged.boxes.tolist()):
        x, y = round((cx - w / 2) * 120), round((cy - h / 2) * 100)
        part = picture[:, y : y + round(h * 100), x : x + round(w * 120)]
        assert (part == 50 * number).all(), "each box is its image"
        below, right = divmod(number, 2)
        assert (y >= 50) == bool(below)
        assert (x >= 60) == bool(right)
    assert ((merged.boxes[:, :2] - merged.boxes[:, 2:] / 2) >= -1e-6).all()


def test_mosaics_come_by_chance_where_they_are_allowed():
    data = Pictures(20)
    shown = Mosaics(data, 1.0)
    torch.manual_seed(1)
    plain, mixed = shown[3], shown[3, True]
    assert torch.equal(plain[0], data[3][0])
    assert mixed[0].shape == plain[0].shape
    assert len(mixed[1].labels) == 4
    assert mixed[1].image_id == plain[1].image_id
    assert torch.equal(shown[3, True][0], mixed[0]), "the seed decides"
    torch.manual_seed(2)
    assert not torch.equal(shown[3, True][0], mixed[0])
    assert len(Mosaics(data, 0.0)[3, True][1].labels) == 1


def test_mosaics_leave_the_sizes_alone():
    data = Pictures(24, transform=training(64, 128, DataConfig()))
    for mosaics in (False, True):
        batches = loader(Mosaics(data, 0.5), 1, 0, True, 0, aspect_ratio_grouping=True)
        batches.sampler.set_epoch(1, mosaic=mosaics)
        sizes = [batches.sampler.measure(keys[0]) for keys in batches.sampler]
        assert [images.pixels.shape[-2:] for images, _ in batches] == sizes
