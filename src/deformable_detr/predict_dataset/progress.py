"""Progress of a run: finished and failed units, speed and remaining time."""

import time
from collections.abc import Callable
from datetime import timedelta

from ..utils.errors import UserError
from .manifest import Manifest
from .parquet import ImageCounts

MAX_WORKER_DEATHS = 2  # retries of a unit after its worker died
MAX_FAILURES = 10  # consecutive failures that end the run
REPORT_INTERVAL = 10.0  # seconds


class Progress:
    """Count the finished units of a run and call `report` with a line every few seconds."""

    def __init__(self, manifest: Manifest, finished: dict[int, ImageCounts], report: Callable[[str], None]) -> None:
        self.manifest, self.finished, self.report = manifest, finished, report
        self.failures: dict[int, str] = {}
        self._consecutive_failures = 0
        self._images_before = self.counts.images
        self.start()

    def start(self) -> None:
        """Measure the speed from now on."""
        self._started = self._reported = time.monotonic()

    @property
    def counts(self) -> ImageCounts:
        """Counts of all finished units."""
        units = self.finished.values()
        return ImageCounts(sum(unit.images for unit in units), sum(unit.unreadable for unit in units))

    @property
    def missing(self) -> list[int]:
        """Units that are not finished."""
        return [unit for unit in range(self.manifest.num_units) if unit not in self.finished]

    def add(self, unit: int, counts: ImageCounts, failure: str) -> None:
        """Add the result of a unit. Raises UserError after too many consecutive failures."""
        if failure:
            self.failures[unit] = failure
            self._consecutive_failures += 1
            if self._consecutive_failures >= MAX_FAILURES and len(self.failures) > len(self.finished):
                raise UserError(f"stopped after {self._consecutive_failures} consecutive failed units: {failure}")
            return
        self.finished[unit], self._consecutive_failures = counts, 0
        if time.monotonic() - self._reported >= REPORT_INTERVAL:
            self._reported = time.monotonic()
            self.report(self.line())

    def line(self) -> str:
        """Return for example "12000 of 50000 images, 3 unreadable, 41.0 images/s, about 0:15:27 left"."""
        counts, manifest = self.counts, self.manifest
        elapsed = max(time.monotonic() - self._started, 1e-3)
        new = counts.images - self._images_before
        total = "" if manifest.num_images is None else f" of {manifest.num_images}"
        remaining = ""
        if new:
            done, goal = counts.images, manifest.num_images
            if goal is None:
                done, goal = len(self.finished), manifest.num_units
            seconds = elapsed * (goal - done) / done * counts.images / new
            remaining = f", about {timedelta(seconds=round(seconds))} left"
        return f"{counts.images}{total} images, {counts.unreadable} unreadable, {new / elapsed:.1f} images/s{remaining}"

    def raise_if_failed(self) -> None:
        """Raise UserError if units are missing."""
        if missing := self.missing:
            reason = self.failures.get(missing[0], f"no worker finished it in {MAX_WORKER_DEATHS + 1} attempts")
            raise UserError(
                f"{len(missing)} of {self.manifest.num_units} units failed, first unit {missing[0]}: {reason}; "
                "run the same command to retry them"
            )
