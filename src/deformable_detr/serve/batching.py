"""Dynamic batching: requests from an event loop, gathered for one thread that does the work."""

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
class _Entry:
    payload: Any
    key: Hashable
    arrived: float
    future: asyncio.Future[Any]


class Batcher:
    """Runs `run(payloads)` in a thread of its own, on at most `most` payloads of equal key at once.

    run: gives as many results as it gets payloads, or raises; then every payload of that batch fails with it.
    wait: seconds that the oldest payload waits for others of its key; a full batch does not wait.
    begin: is called in the thread before anything else.

    The oldest payload's batch always comes first. Futures that were canceled meanwhile are not worked on. The number
    of waiting payloads is the caller's to bound.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Any]], Sequence[Any]],
        most: int,
        wait: float,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._most, self._wait, self._begin = run, most, wait, begin
        self._entries: deque[_Entry] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._started: threading.Event = threading.Event()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Returns when `begin` has; raises what it raised."""
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Finishes what is there and ends the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def __len__(self) -> int:
        return len(self._entries)

    def submit(self, payload: Any, key: Hashable) -> asyncio.Future[Any]:
        """The result to come, for the running event loop. Raises RuntimeError after `stop`."""
        future = asyncio.get_running_loop().create_future()
        with self._changed:
            if self._stopping:
                raise RuntimeError("the batcher was stopped")
            self._entries.append(entry := _Entry(payload, key, time.monotonic(), future))
            self._changed.notify()
        future.add_done_callback(lambda done: self._forget(entry) if done.cancelled() else None)
        return future

    def _forget(self, entry: _Entry) -> None:
        """Lets go of what nobody waits for any more, and of its memory."""
        with self._changed, suppress(ValueError):  # it may be with the thread already
            self._entries.remove(entry)

    def _work(self) -> None:
        try:
            self._begin()
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._started.set()
        while batch := self._next():
            try:
                results = self._run([entry.payload for entry in batch])
                outcomes: list[tuple[Any, BaseException | None]] = [(result, None) for result in results]
            except Exception as error:
                outcomes = [(None, error)] * len(batch)
            # One call a loop, of which there is one: waking the loop is what costs.
            loop = batch[0].future.get_loop()
            try:
                loop.call_soon_threadsafe(_deliver, batch, outcomes)
            except RuntimeError:
                _log.debug("the event loop is closed: results are lost with it")
            del batch

    def _next(self) -> list[_Entry]:
        """The next batch; empty: stopped and nothing left."""
        with self._changed:
            while True:
                while self._entries and self._entries[0].future.cancelled():
                    self._entries.popleft()
                if self._entries:
                    first = self._entries[0]
                    chosen = [one for one in self._entries if one.key == first.key and not one.future.cancelled()]
                    left = first.arrived + self._wait - time.monotonic()
                    if not chosen:
                        continue
                    if len(chosen) >= self._most or left <= 0 or self._stopping:
                        del chosen[self._most :]
                        taken = set(map(id, chosen))
                        self._entries = deque(entry for entry in self._entries if id(entry) not in taken)
                        return chosen
                    self._changed.wait(left)
                elif self._stopping:
                    return []
                else:
                    self._changed.wait()


def _deliver(batch: Sequence[_Entry], outcomes: Sequence[tuple[Any, BaseException | None]]) -> None:
    for entry, (result, error) in zip(batch, outcomes, strict=True):
        if entry.future.done():
            continue
        if error is None:
            entry.future.set_result(result)
        else:
            entry.future.set_exception(error)
