"""Dynamic batching: collect requests of an event loop into batches for one worker thread."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Job:
    payload: Any
    key: Hashable
    submitted: float
    future: asyncio.Future[Any]


class Batcher:
    """Run a function in its own thread on batches of payloads with equal keys.

    The batch of the oldest payload runs first. Payloads whose futures were canceled are skipped. The caller limits how
    many payloads wait.

    Args:
        run: Returns one result per payload, or raises: then every payload of the batch fails with that error.
        max_batch_size: Maximum payloads per batch.
        wait: How many seconds the oldest payload waits for others with its key. A full batch does not wait.
        begin: Called first in the thread.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Any]], Sequence[Any]],
        max_batch_size: int,
        wait: float,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._max_batch_size, self._wait, self._begin = run, max_batch_size, wait, begin
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._error: BaseException | None = None

    def start(self) -> None:
        """Start the thread and wait for `begin`; raise its error."""
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Finish the submitted payloads and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def __len__(self) -> int:
        return len(self._jobs)

    def submit(self, payload: Any, key: Hashable) -> asyncio.Future[Any]:
        """Return a future of the running event loop for the result. Raises RuntimeError after `stop`."""
        future = asyncio.get_running_loop().create_future()
        with self._changed:
            if self._stopping:
                raise RuntimeError("the batcher was stopped")
            self._jobs.append(job := _Job(payload, key, time.monotonic(), future))
            self._changed.notify()
        future.add_done_callback(lambda done: self._discard(job) if done.cancelled() else None)
        return future

    def _discard(self, job: _Job) -> None:
        """Release the memory of a canceled job, unless the thread has taken it."""
        with self._changed, suppress(ValueError):
            self._jobs.remove(job)

    def _work(self) -> None:
        try:
            self._begin()
        except BaseException as error:
            self._error = error
            return
        finally:
            self._started.set()
        while batch := self._next_batch():
            try:
                results = self._run([job.payload for job in batch])
                outcomes: list[tuple[Any, BaseException | None]] = [(result, None) for result in results]
            except Exception as error:
                outcomes = [(None, error)] * len(batch)
            try:
                batch[0].future.get_loop().call_soon_threadsafe(_resolve, batch, outcomes)
            except RuntimeError:
                _log.debug("the event loop is closed; its results are dropped")
            del batch

    def _next_batch(self) -> list[_Job]:
        """Wait for the next batch; return none after `stop` when no jobs are left."""
        with self._changed:
            while True:
                while self._jobs and self._jobs[0].future.cancelled():
                    self._jobs.popleft()
                if not self._jobs:
                    if self._stopping:
                        return []
                    self._changed.wait()
                    continue
                oldest = self._jobs[0]
                batch = [job for job in self._jobs if job.key == oldest.key and not job.future.cancelled()]
                remaining = oldest.submitted + self._wait - time.monotonic()
                if batch and (len(batch) >= self._max_batch_size or remaining <= 0 or self._stopping):
                    del batch[self._max_batch_size :]
                    for job in batch:
                        self._jobs.remove(job)
                    return batch
                if batch:
                    self._changed.wait(remaining)


def _resolve(batch: Sequence[_Job], outcomes: Sequence[tuple[Any, BaseException | None]]) -> None:
    for job, (result, error) in zip(batch, outcomes, strict=True):
        if job.future.done():
            continue
        if error is None:
            job.future.set_result(result)
        else:
            job.future.set_exception(error)
