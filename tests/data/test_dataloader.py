"""Batches: the canvas, the order and the random choices, errors through worker processes."""

import multiprocessing
import pickle
from dataclasses import replace

import pytest
import torch
from torch.utils.data import Dataset

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


class Squares(Dataset):
    """Images of different sizes; the pixels and boxes are drawn at random at each reading."""

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


def load(dataset, *options, **more):
    return build_dataloader(dataset, LoaderOptions(*options, **more))


class Crash(Squares):
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


def equal(one, other):
    return len(one) == len(other) and all(
        a[0].shape == b[0].shape
        and torch.equal(a[0], b[0])
        and torch.equal(a[1], b[1])
        and [t[:3] for t in a[2]] == [t[:3] for t in b[2]]
        and all(torch.equal(s[3], t[3]) for s, t in zip(a[2], b[2], strict=True))
        for a, b in zip(one, other, strict=True)
    )


def ids(batches):
    return [target.image_id - 100 for _, targets in batches for target in targets]


def test_collate():
    samples = [Squares()[index] for index in (0, 9, 4)]
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
def test_workers_change_nothing(method):
    data = Squares()
    plain, worked = (load(data, 4, workers, shuffle=True, seed=7) for workers in (0, 2))
    worked.multiprocessing_context = multiprocessing.get_context(method)
    for epoch in (0, 1, 5):
        plain.sampler.set_epoch(epoch)
        worked.sampler.set_epoch(epoch)
        one, other = contents(plain), contents(worked)
        assert equal(one, other)
        assert len(one) == len(plain) == 3


def test_order_and_choices_follow_seed_and_epoch():
    data = Squares()

    def epoch(seed, number):
        batches = load(data, 4, shuffle=True, seed=seed)
        batches.sampler.set_epoch(number)
        return contents(batches)

    first = epoch(0, 1)
    torch.manual_seed(99)
    assert equal(first, epoch(0, 1))
    assert not equal(first, epoch(0, 0))
    assert not equal(first, epoch(1, 0))
    assert sorted(n for batch in first for n, *_ in batch[2]) == list(range(100, 110))

    still = load(data, 4)
    once = contents(still)
    assert ids(still) == list(range(10))
    assert equal(once, contents(still)), "one epoch is the same however often it is read"
    still.sampler.set_epoch(1)
    assert not equal(once, contents(still)), "another epoch draws anew"


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(load(Squares(), 4, shuffle=True))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_user_errors_arrive_as_one_line(workers):
    with pytest.raises(UserError) as caught:
        list(load(Squares(broken=(6,)), 4, workers))
    assert str(caught.value) == "image-6.jpg: cannot be read"
    assert len(ids(load(Squares(), 4, workers))) == 10


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        list(load(Crash(), 4, 1))


def test_leaving_an_epoch_early():
    batches = load(Squares(), 2, 1)
    assert ids([next(iter(batches))]) == [0, 1]
    assert ids(batches) == list(range(10))


def test_samples_without_objects():
    images, targets = next(iter(load(Squares(1), 4, 0)))
    assert len(images) == 1
    assert targets[0].boxes.shape == (0, 4)
    assert targets[0].labels.dtype == torch.int64
    assert pickle.loads(pickle.dumps(targets[0])).original_size == (4, 20)


# --- the sampler


def indices(sampler):
    return [[key.index for key in batch] for batch in sampler]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("total_batch_size", [None, 4, 6, 11])
def test_every_image_is_seen_once_by_one_process(size, total_batch_size):
    options = LoaderOptions(2, shuffle=True, total_batch_size=total_batch_size, world_size=size)
    samplers = [DistributedBatchSampler(23, replace(options, rank=rank)) for rank in range(size)]
    batches = [indices(sampler) for sampler in samplers]
    assert sorted(index for own in batches for batch in own for index in batch) == list(range(23))
    assert len({len(own) for own in batches}) == 1, "all have equally many passes"
    assert max(len(batch) for own in batches for batch in own) <= 2
    assert (
        len(batches[0])
        == len(samplers[0])
        == sum(samplers[0].micro_batches(step) for step in range(samplers[0].num_steps))
    )


def test_steps_are_the_same_images_in_any_number_of_processes():
    def steps(size, batch_size):
        options = LoaderOptions(batch_size, shuffle=True, seed=3, total_batch_size=8, world_size=size)
        samplers = [DistributedBatchSampler(22, replace(options, rank=rank)) for rank in range(size)]
        found = [[] for _ in range(samplers[0].num_steps)]
        for sampler in samplers:
            batches = iter(indices(sampler))
            for step, seen in enumerate(found):
                seen.extend(index for _ in range(sampler.micro_batches(step)) for index in next(batches))
        return [sorted(seen) for seen in found]

    assert steps(1, 8) == steps(1, 3) == steps(2, 4) == steps(3, 1)


def test_an_epoch_resumes_at_any_step():
    for sample_size in (None, lambda key: (1 + key.index % 7, 1 + key.index % 11)):
        sampler = DistributedBatchSampler(200, LoaderOptions(2, shuffle=True, seed=5, total_batch_size=4), sample_size)
        sampler.set_epoch(2)
        whole = indices(sampler)
        for skip in (1, POOL_STEPS, POOL_STEPS + 3):
            sampler.set_epoch(2, start_step=skip)
            assert indices(sampler) == whole[2 * skip :]
        sampler.set_epoch(2, start_step=1, step_stride=3)
        assert indices(sampler)[:2] == whole[2:4]


def padding(batches):
    return 1 - sum(float((~images.padding_mask).sum()) for images, _ in batches) / sum(
        images.padding_mask.numel() for images, _ in batches
    )


def test_buckets_have_less_padding_and_all_images():
    data = PlainImages(transform=TrainTransform(64, 128))
    plain, bucketed = (list(load(data, 4, shuffle=True, aspect_ratio_grouping=grouping)) for grouping in (False, True))
    assert padding(bucketed) < 0.5 * padding(plain)
    assert [len(images) for images, _ in bucketed] == [len(images) for images, _ in plain]
    again = list(load(data, 4, shuffle=True, aspect_ratio_grouping=True))
    assert all(torch.equal(a[0].pixels, b[0].pixels) for a, b in zip(bucketed, again, strict=True))


def test_the_size_of_a_sample_is_known_beforehand():
    data = PlainImages(40, transform=TrainTransform(64, 128))
    batches = load(data, 1, shuffle=True, aspect_ratio_grouping=True)
    sample_size = batches.sampler.sample_size
    for keys, (images, _) in zip(batches.sampler, batches, strict=True):
        assert sample_size(keys[0]) == images.pixels.shape[-2:]
    assert sample_size(SampleKey(0, 3)) != sample_size(SampleKey(1, 3)), "another epoch, other choices"
