"""How often an epoch of training shows each sample: repeat-factor sampling, and samples that share a file."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

READ_TOGETHER = 4  # most samples of one file that follow each other


@dataclass(frozen=True, eq=False)
class EpochSampling:
    """The samples of each epoch. Every epoch has the same number of them.

    Attributes:
        frequencies: (V,) float64, how often an epoch shows each of V samples on average; 1.5: once or twice.
        files: (V,) int64, the file of each sample. Some of one file follow each other, so that it is decoded for all of
            them. If omitted, the order is random.
    """

    frequencies: np.ndarray
    files: np.ndarray | None = None

    def __len__(self) -> int:
        return int(np.floor(self.frequencies).sum()) + self._num_extra

    @property
    def _num_extra(self) -> int:
        """How many samples an epoch shows once more than the whole part of their frequency, or than not at all."""
        return math.ceil(float((self.frequencies % 1).sum()) - 1e-6)

    def draw(self, seed: int, epoch: int, together: int = READ_TOGETHER) -> tuple[np.ndarray, np.ndarray]:
        """Return the samples of an epoch in random order, and how often each one was already shown in it.

        Fractions of the frequencies are rounded at random, as in LVIS, but by systematic sampling: the number of
        samples stays the same.

        Args:
            seed: Seed of the run.
            epoch: Number of the epoch.
            together: Samples of one file that follow each other; the rest of a file's samples are singles.
        """
        random = np.random.default_rng((seed, epoch))
        times, fractions = np.floor(self.frequencies).astype(np.int64), self.frequencies % 1
        if extra := self._num_extra:
            order = random.permutation(len(times))
            ends = random.random() + np.cumsum(fractions[order]) * (extra / fractions.sum())
            ends[-1] = extra  # without rounding errors
            times[order] += np.diff(np.floor(ends).astype(np.int64), prepend=0)
        samples = np.repeat(np.arange(len(times)), times)
        copies = np.arange(len(samples)) - np.repeat(np.cumsum(times) - times, times)
        order = random.permutation(len(samples))
        if self.files is not None and together > 1:
            order = order[_bundle(self.files[samples[order]], together, random)]
        return samples[order], copies[order]


def repeat_factors(samples: np.ndarray, labels: np.ndarray, weights: np.ndarray, threshold: float) -> np.ndarray:
    """Return how often an epoch shows each sample: max(1, √(threshold / f)) for its rarest class.

    f is the share of the samples with the class ("repeat factor sampling" in Gupta et al. 2019, LVIS).

    Args:
        samples: (N,) the sample of each object.
        labels: (N,) the class of each object.
        weights: (V,) how often an epoch shows each of V samples without repetition.
        threshold: Share of the samples from which on a class is not rare, 0..1; 0 repeats nothing.

    Returns:
        (V,) float64, at least 1.
    """
    factors = np.ones(len(weights))
    if not threshold or not len(labels):
        return factors
    pairs = np.unique(np.stack([samples, labels]), axis=1)  # a class counts once per sample
    shares = np.bincount(pairs[1], weights[pairs[0]]) / weights.sum()
    np.maximum.at(factors, pairs[0], np.sqrt(threshold / shares[pairs[1]]))
    return factors


def _bundle(files: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """Return an order of samples (N,) in bundles of `size`: of one file, or, where fewer are left, of several."""
    by_file = np.argsort(files, kind="stable")
    _, starts, counts = np.unique(files[by_file], return_index=True, return_counts=True)
    places = np.arange(len(files)) - np.repeat(starts, counts)
    full = places < np.repeat(counts // size * size, counts)
    singles = np.sort(by_file[~full])  # again in random order
    bundled = len(singles) // size * size
    bundles = np.concatenate([by_file[full], singles[:bundled]]).reshape(-1, size)
    return np.concatenate([random.permutation(bundles).reshape(-1), singles[bundled:]])
