"""What an optimizer step must know of its whole batch, over all passes and processes, to be one and the same step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..structures import ImageBatch, Target

Batch = tuple[ImageBatch, list[Target]]


@dataclass(frozen=True)
class BatchStats:
    """Figures of a step's whole batch, the same in every process but for `first`.

    images, objects: how many; most: objects in one image; first: images of the processes before this one;
    processes: how many there are.
    """

    images: int
    objects: int
    most: int
    first: int = 0
    processes: int = 1

    @property
    def num_boxes(self) -> float:
        """What each process divides its sums by. Gradients are averaged over the processes: hence a share of all."""
        return max(self.objects, 1) / self.processes


def own_figures(passes: Sequence[Batch]) -> tuple[int, int, int]:
    """(images, objects, most objects in an image) of this process."""
    counts = [len(target.labels) for _, targets in passes for target in targets]
    return len(counts), sum(counts), max(counts, default=0)


def combined(figures: Sequence[Sequence[float]], rank: int = 0) -> BatchStats:
    """The totals from every process's `own_figures`, as process `rank` needs them."""
    images, objects, most = ([int(own[place]) for own in figures] for place in range(3))
    return BatchStats(sum(images), sum(objects), max(most), sum(images[:rank]), len(figures))
