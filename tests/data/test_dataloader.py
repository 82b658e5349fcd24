"""Batches: the canvas, the order and the random choices, errors through worker processes."""

import multiprocessing
import pickle

import pytest
import torch
from torch.utils.data import Dataset

from deformable_detr.data.dataloader import collate, loader
from deformable_detr.structures import Target
from deformable_detr.utils.errors import UserError


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
    plain, worked = (loader(data, 4, workers, shuffle=True, seed=7) for workers in (0, 2))
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
        batches = loader(data, 4, 0, shuffle=True, seed=seed)
        batches.sampler.set_epoch(number)
        return contents(batches)

    first = epoch(0, 1)
    torch.manual_seed(99)
    assert equal(first, epoch(0, 1))
    assert not equal(first, epoch(0, 0))
    assert not equal(first, epoch(1, 0))
    assert sorted(n for batch in first for n, *_ in batch[2]) == list(range(100, 110))

    still = loader(data, 4, 0, shuffle=False, seed=0)
    once = contents(still)
    assert ids(still) == list(range(10))
    assert equal(once, contents(still)), "one epoch is the same however often it is read"
    still.sampler.set_epoch(1)
    assert not equal(once, contents(still)), "another epoch draws anew"


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(loader(Squares(), 4, 0, shuffle=True, seed=0))
    assert torch.equal(torch.rand(3), expected)


def test_drop_last():
    assert [len(images) for images, _ in loader(Squares(), 4, 0, shuffle=False, seed=0)] == [4, 4, 2]
    dropped = loader(Squares(), 4, 0, shuffle=False, seed=0, drop_last=True)
    assert [len(images) for images, _ in dropped] == [4, 4]
    assert len(dropped) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_user_errors_arrive_as_one_line(workers):
    with pytest.raises(UserError) as caught:
        list(loader(Squares(broken=(6,)), 4, workers, shuffle=False, seed=0))
    assert str(caught.value) == "image-6.jpg: cannot be read"
    assert len(ids(loader(Squares(), 4, workers, shuffle=False, seed=0))) == 10


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        list(loader(Crash(), 4, 1, shuffle=False, seed=0))


def test_leaving_an_epoch_early():
    batches = loader(Squares(), 2, 1, shuffle=False, seed=0)
    assert ids([next(iter(batches))]) == [0, 1]
    assert ids(batches) == list(range(10))


def test_samples_without_objects():
    images, targets = next(iter(loader(Squares(1), 4, 0, shuffle=False, seed=0)))
    assert len(images) == 1
    assert targets[0].boxes.shape == (0, 4)
    assert targets[0].labels.dtype == torch.int64
    assert pickle.loads(pickle.dumps(targets[0])).original_size == (4, 20)
