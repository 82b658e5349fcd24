"""Batches: collation, order, random state, errors in worker processes and the batch sampler."""

import multiprocessing
import pickle
from dataclasses import replace

import pytest
import torch
from torch.utils.data import Dataset

from deformable_detr.config.image_size import ShortestEdge
from deformable_detr.data.dataloader import (
    POOL_STEPS,
    DistributedBatchSampler,
    LoaderOptions,
    SampleKey,
    build_dataloader,
    collate,
)
from deformable_detr.data.transforms import TrainTransform
from deformable_detr.structures import Target
from deformable_detr.utils.errors import UserError
from tests.support.plain_images import PlainImages


class RandomImages(Dataset):
    """Images of different sizes with random pixels and boxes at each read."""

    def __init__(self, length=10, broken=()):
        self.length, self.broken = length, broken

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.broken:
            raise UserError(f"image-{index}.jpg: cannot be read")
        image = torch.randint(1, 256, (3, 4 + index, 20 - index), dtype=torch.uint8)
        objects = index % 3
        return image, Target(
            torch.full((objects,), index), torch.rand(objects, 4), index + 100, (4 + index, 20 - index)
        )


def load(dataset, *args, **options):
    return build_dataloader(dataset, LoaderOptions(*args, **options))


class CrashingDataset(RandomImages):
    def __getitem__(self, index):
        raise ZeroDivisionError("a fault of ours")


def contents(batches):
    return [
        (
            images.pixels,
            images.padding_mask,
            [(t.image_id, t.original_size, t.labels.tolist(), t.boxes) for t in targets],
        )
        for images, targets in batches
    ]


def same_contents(first, second):
    return len(first) == len(second) and all(
        a[0].shape == b[0].shape
        and torch.equal(a[0], b[0])
        and torch.equal(a[1], b[1])
        and [t[:3] for t in a[2]] == [t[:3] for t in b[2]]
        and all(torch.equal(s[3], t[3]) for s, t in zip(a[2], b[2], strict=True))
        for a, b in zip(first, second, strict=True)
    )


def ids(batches):
    return [target.image_id - 100 for _, targets in batches for target in targets]


def test_collate():
    samples = [RandomImages()[index] for index in (0, 9, 4)]
    images, targets = collate(samples)
    assert images.pixels.shape == (3, 3, 13, 20)
    assert images.pixels.dtype == torch.uint8
    assert images.padding_mask.shape == (3, 13, 20)
    for pixels, mask, (image, _) in zip(images.pixels, images.padding_mask, samples, strict=True):
        height, width = image.shape[-2:]
        assert torch.equal(pixels[:, :height, :width], image)
        assert not mask[:height, :width].any()
        assert mask.sum() == 13 * 20 - height * width
        assert (pixels[:, mask] == 0).all()
        assert (pixels[:, ~mask] > 0).all()
    assert targets == [target for _, target in samples]
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.2, 0.2])
    normal = images.normalize(mean, std).pixels
    assert (normal.permute(0, 2, 3, 1)[images.padding_mask] == 0).all()
    assert not (normal.permute(0, 2, 3, 1)[~images.padding_mask] == 0).all()


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_do_not_change_the_batches(method):
    data = RandomImages()
    serial, parallel = (load(data, 4, workers, shuffle=True, seed=7) for workers in (0, 2))
    parallel.multiprocessing_context = multiprocessing.get_context(method)
    for epoch in (0, 1, 5):
        serial.sampler.set_epoch(epoch)
        parallel.sampler.set_epoch(epoch)
        first, second = contents(serial), contents(parallel)
        assert same_contents(first, second)
        assert len(first) == len(serial) == 3


def test_order_and_augmentation_depend_on_seed_and_epoch():
    data = RandomImages()

    def epoch(seed, number):
        batches = load(data, 4, shuffle=True, seed=seed)
        batches.sampler.set_epoch(number)
        return contents(batches)

    first = epoch(0, 1)
    torch.manual_seed(99)
    assert same_contents(first, epoch(0, 1))
    assert not same_contents(first, epoch(0, 0))
    assert not same_contents(first, epoch(1, 0))
    assert sorted(n for batch in first for n, *_ in batch[2]) == list(range(100, 110))

    unshuffled = load(data, 4)
    original = contents(unshuffled)
    assert ids(unshuffled) == list(range(10))
    assert same_contents(original, contents(unshuffled)), "rereading an epoch gives the same samples"
    unshuffled.sampler.set_epoch(1)
    assert not same_contents(original, contents(unshuffled)), "another epoch gives other samples"


def test_global_random_state_is_not_changed():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(load(RandomImages(), 4, shuffle=True))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_user_errors_are_one_line(workers):
    with pytest.raises(UserError) as caught:
        list(load(RandomImages(broken=(6,)), 4, workers))
    assert str(caught.value) == "image-6.jpg: cannot be read"
    assert len(ids(load(RandomImages(), 4, workers))) == 10


def test_other_errors_are_not_changed():
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        list(load(CrashingDataset(), 4, 1))


def test_epoch_can_be_abandoned():
    batches = load(RandomImages(), 2, 1)
    assert ids([next(iter(batches))]) == [0, 1]
    assert ids(batches) == list(range(10))


def test_samples_without_objects():
    images, targets = next(iter(load(RandomImages(1), 4, 0)))
    assert len(images) == 1
    assert targets[0].boxes.shape == (0, 4)
    assert targets[0].labels.dtype == torch.int64
    assert pickle.loads(pickle.dumps(targets[0])).original_size == (4, 20)


# --- the sampler


def batch_indices(sampler):
    return [[key.index for key in batch] for batch in sampler]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("total_batch_size", [None, 4, 6, 11])
def test_each_image_is_read_once_by_one_process(size, total_batch_size):
    options = LoaderOptions(2, shuffle=True, total_batch_size=total_batch_size, world_size=size)
    samplers = [DistributedBatchSampler(23, replace(options, rank=rank)) for rank in range(size)]
    batches = [batch_indices(sampler) for sampler in samplers]
    assert sorted(index for rank_batches in batches for batch in rank_batches for index in batch) == list(range(23))
    assert len({len(rank_batches) for rank_batches in batches}) == 1, "every rank has as many micro-batches"
    assert max(len(batch) for rank_batches in batches for batch in rank_batches) <= 2
    assert (
        len(batches[0])
        == len(samplers[0])
        == sum(samplers[0].micro_batches(step) for step in range(samplers[0].num_steps))
    )


def test_steps_contain_the_same_images_for_any_world_size():
    def steps(size, batch_size):
        options = LoaderOptions(batch_size, shuffle=True, seed=3, total_batch_size=8, world_size=size)
        samplers = [DistributedBatchSampler(22, replace(options, rank=rank)) for rank in range(size)]
        images_per_step = [[] for _ in range(samplers[0].num_steps)]
        for sampler in samplers:
            batches = iter(batch_indices(sampler))
            for step, images in enumerate(images_per_step):
                images.extend(index for _ in range(sampler.micro_batches(step)) for index in next(batches))
        return [sorted(images) for images in images_per_step]

    assert steps(1, 8) == steps(1, 3) == steps(2, 4) == steps(3, 1)


def test_epoch_resumes_at_any_step():
    for sample_size in (None, lambda key: (1 + key.index % 7, 1 + key.index % 11)):
        sampler = DistributedBatchSampler(200, LoaderOptions(2, shuffle=True, seed=5, total_batch_size=4), sample_size)
        sampler.set_epoch(2)
        full_epoch = batch_indices(sampler)
        for skip in (1, POOL_STEPS, POOL_STEPS + 3):
            sampler.set_epoch(2, start_step=skip)
            assert batch_indices(sampler) == full_epoch[2 * skip :]
        sampler.set_epoch(2, start_step=1, step_stride=3)
        assert batch_indices(sampler)[:2] == full_epoch[2:4]


def padding(batches):
    return 1 - sum(float((~images.padding_mask).sum()) for images, _ in batches) / sum(
        images.padding_mask.numel() for images, _ in batches
    )


def test_aspect_ratio_grouping_reduces_padding_and_keeps_all_images():
    data = PlainImages(transform=TrainTransform(ShortestEdge(64, 128)))
    ungrouped, grouped = (
        list(load(data, 4, shuffle=True, aspect_ratio_grouping=grouping)) for grouping in (False, True)
    )
    assert padding(grouped) < 0.5 * padding(ungrouped)
    assert [len(images) for images, _ in grouped] == [len(images) for images, _ in ungrouped]
    repeated = list(load(data, 4, shuffle=True, aspect_ratio_grouping=True))
    assert all(torch.equal(a[0].pixels, b[0].pixels) for a, b in zip(grouped, repeated, strict=True))


def test_sample_size_is_known_before_reading():
    data = PlainImages(40, transform=TrainTransform(ShortestEdge(64, 128)))
    batches = load(data, 1, shuffle=True, aspect_ratio_grouping=True)
    sample_size = batches.sampler.sample_size
    for keys, (images, _) in zip(batches.sampler, batches, strict=True):
        assert sample_size(keys[0]) == images.pixels.shape[-2:]
    assert sample_size(SampleKey(0, 3)) != sample_size(SampleKey(1, 3)), "depends on the epoch"
