"""Dynamic batching: collect payloads into batches for one worker thread."""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class _Job:
    payload: Any
    key: Hashable
    submitted: float
    future: Future[Any]


class Batcher:
    """Run a function in its own thread on batches of payloads with equal keys.

    The batch of the oldest payload runs first. Payloads whose futures were canceled are skipped. The caller limits how
    many payloads wait.

    Args:
        run: Returns one result per payload, or raises: then every payload of the batch fails with that error.
        max_batch_size: Maximum payloads per batch.
        wait: How many seconds the oldest payload waits for others with its key. A full batch does not wait.
    """

    def __init__(self, run: Callable[[Sequence[Any]], Sequence[Any]], max_batch_size: int, wait: float) -> None:
        self._run, self._max_batch_size, self._wait = run, max_batch_size, wait
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

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

    def submit(self, payload: Any, key: Hashable) -> Future[Any]:
        """Return a future for the result. Raises RuntimeError after `stop`."""
        job = _Job(payload, key, time.monotonic(), Future())
        with self._changed:
            if self._stopping:
                raise RuntimeError("the batcher was stopped")
            self._jobs.append(job)
            self._changed.notify()
        job.future.add_done_callback(lambda future: self._discard(job) if future.cancelled() else None)
        return job.future

    def _discard(self, job: _Job) -> None:
        """Release the memory of a canceled job, unless the thread has taken it."""
        with self._changed, suppress(ValueError):
            self._jobs.remove(job)

    def _work(self) -> None:
        while self._run_next_batch():
            pass

    def _run_next_batch(self) -> bool:
        batch = self._next_batch()
        try:
            results = self._run([job.payload for job in batch]) if batch else []
        except Exception as error:
            for job in batch:
                job.future.set_exception(error)
        else:
            for job, result in zip(batch, results, strict=True):
                job.future.set_result(result)
        return bool(batch)

    def _next_batch(self) -> list[_Job]:
        """Wait for the next batch; return none after `stop` when no jobs are left."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._jobs or self._stopping)
                if not self._jobs:
                    return []
                oldest = self._jobs[0]
                batch = [job for job in self._jobs if job.key == oldest.key][: self._max_batch_size]
                remaining = oldest.submitted + self._wait - time.monotonic()
                if len(batch) < self._max_batch_size and remaining > 0 and not self._stopping:
                    self._changed.wait(remaining)
                    continue
                for job in batch:
                    self._jobs.remove(job)
                if running := [job for job in batch if job.future.set_running_or_notify_cancel()]:
                    return running
