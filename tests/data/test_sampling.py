"""How often an epoch shows each sample: repeat factors, rounding, sharding, resume and bundles of one file."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from deformable_detr.data.dataloader import DistributedBatchSampler, LoaderOptions, SampleKey, build_dataloader
from deformable_detr.data.sampling import EpochSampling, repeat_factors
from tests.support.plain_images import PlainImages, target

FREQUENCIES = np.array([1.0, 1.0, 2.0, 1.25, 3.5, 0.4, 0.0, 1.1, 2.75])


def counts(sampling, seed=0, epochs=1, **options):
    drawn = [sampling.draw(seed, epoch, **options)[0] for epoch in range(epochs)]
    return np.stack([np.bincount(samples, minlength=len(sampling.frequencies)) for samples in drawn])


def test_repeat_factors_are_those_of_lvis():
    # class 0 is in images 0..7, class 1 in images 0 and 1 (twice there), class 2 in image 2
    images = np.array([*range(8), 0, 1, 1, 2])
    labels = np.array([0] * 8 + [1, 1, 1, 2])
    share = {0: 0.8, 1: 0.2, 2: 0.1}
    factors = {label: max(1.0, (0.5 / share[label]) ** 0.5) for label in share}
    expected = [factors[1], factors[1], factors[2], *[1.0] * 7]
    np.testing.assert_allclose(repeat_factors(images, labels, np.ones(10), 0.5), expected)
    np.testing.assert_array_equal(repeat_factors(images, labels, np.ones(10), 0.0), np.ones(10))
    # an image that an epoch shows half of the time counts half
    weights = np.array([*np.ones(8), 0.5, 0.5])
    np.testing.assert_allclose(repeat_factors(images, labels, weights, 0.5)[2], (0.5 / (1 / 9)) ** 0.5)


def test_every_epoch_has_the_same_number_of_samples():
    sampling = EpochSampling(FREQUENCIES)
    drawn = counts(sampling, epochs=2000)
    assert set(drawn.sum(1).tolist()) == {len(sampling)} == {13}
    assert (drawn >= np.floor(FREQUENCIES)).all(), "rounding never leaves out what is due"
    assert (drawn <= np.ceil(FREQUENCIES)).all()
    np.testing.assert_allclose(drawn.mean(0), FREQUENCIES, atol=0.04)
    fractions = (drawn - np.floor(FREQUENCIES))[:, FREQUENCIES % 1 > 0]
    assert len(np.unique(fractions, axis=0)) > 8, "which samples are rounded up changes from epoch to epoch"


def test_repeated_images_are_never_lost_to_rounding():
    sampling = EpochSampling(np.array([1.4, 1.0]))
    assert len(sampling) == 3, "the only extra sample of an epoch is shown"
    assert len(EpochSampling(np.full(30, 0.1))) == 3, "sums are exact"
    assert len(EpochSampling(np.full(10, 1.0))) == 10


def test_draws_depend_on_seed_and_epoch_only():
    sampling = EpochSampling(FREQUENCIES)
    first = sampling.draw(3, 5)
    assert all(np.array_equal(a, b) for a, b in zip(first, EpochSampling(FREQUENCIES).draw(3, 5), strict=True))
    for other in ((3, 6), (4, 5)):
        assert not np.array_equal(first[0], sampling.draw(*other)[0])
    pairs = set(zip(*(numbers.tolist() for numbers in first), strict=True))
    assert len(pairs) == len(sampling), "copies of a sample are numbered"


@pytest.mark.parametrize("files", [None, np.repeat(np.arange(6), [9, 1, 4, 1, 30, 2])])
def test_sampled_epochs_are_sharded_and_resumed(files):
    frequencies = np.random.default_rng(0).uniform(0.1, 3, 47)
    sampling = EpochSampling(frequencies, files)
    options = LoaderOptions(2, shuffle=True, seed=7, total_batch_size=8, sampling=sampling)

    def keys(size, start_step=0, batch_size=2):
        per_step = {}
        for rank in range(size):
            sampler = DistributedBatchSampler(47, replace(options, batch_size=batch_size, world_size=size, rank=rank))
            sampler.set_epoch(2, start_step)
            batches = iter(sampler)
            for step in range(start_step, sampler.num_steps):
                part = [key for _ in range(sampler.micro_batches(step)) for key in next(batches)]
                per_step.setdefault(step, []).extend(part)
            assert next(batches, None) is None
        return per_step

    one = keys(1)
    assert sum(map(len, one.values())) == len(sampling)
    assert sampler_steps(options) == len(one) == -(-len(sampling) // 8)
    assert keys(2) == keys(3, batch_size=1) == keys(4) == one
    for start_step in (1, 5):
        assert keys(2, start_step) == {step: one[step] for step in one if step >= start_step}
    drawn = np.bincount([key.index for step in one.values() for key in step], minlength=47)
    assert (drawn == counts(sampling, seed=7, epochs=3)[2]).all()


def sampler_steps(options):
    return DistributedBatchSampler(47, options).num_steps


def test_samples_of_a_file_follow_each_other():
    files = np.repeat(np.arange(40), np.random.default_rng(1).integers(1, 30, 40))
    sampling = EpochSampling(np.ones(len(files)), files)

    def reads(samples, size=4):
        bundles = [files[samples[start : start + size]] for start in range(0, len(samples), size)]
        return sum(len(set(bundle.tolist())) for bundle in bundles)

    samples = sampling.draw(0, 0)[0]
    assert sorted(samples.tolist()) == list(range(len(files)))
    rest = sum(count % 4 for count in np.bincount(files))
    assert reads(samples) <= len(files) // 4 + rest < 0.45 * reads(sampling.draw(0, 0, together=1)[0])
    # A step of four samples shows two files at least, of which each may have a bundle.
    sampler = DistributedBatchSampler(len(files), LoaderOptions(4, shuffle=True, sampling=sampling))
    shown = [len({int(files[key.index]) for key in batch}) for batch in sampler]
    assert 1.9 < np.mean(shown) < 2.8


@pytest.mark.parametrize("files", [np.zeros(64, dtype=np.int64), np.arange(64)])
def test_order_is_random_for_one_file_and_for_single_files(files):
    sampling = EpochSampling(np.ones(64), files)
    first, second = (sampling.draw(0, epoch)[0] for epoch in (0, 1))
    assert not np.array_equal(first, second)
    assert np.abs(np.diff(first)).mean() > 8


def test_copies_are_augmented_differently():
    class Noise(PlainImages):
        def __getitem__(self, index):
            return torch.randint(256, (3, 4, 4), dtype=torch.uint8), target([0.5, 0.5, 1, 1])

    sampling = EpochSampling(np.array([3.0, 1.0]))
    loader = build_dataloader(Noise(2), LoaderOptions(4, shuffle=True, sampling=sampling))
    keys, (images, _) = next(iter(loader.sampler)), next(iter(loader))
    assert sorted(keys) == [SampleKey(0, 0, copy=0), SampleKey(0, 0, copy=1), SampleKey(0, 0, copy=2), SampleKey(0, 1)]
    assert len({tuple(image.flatten().tolist()) for image in images.pixels}) == 4
