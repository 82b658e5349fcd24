"""Batching for one thread: equal keys share a batch, oldest first, no lost or needless work."""

import asyncio
import threading
from collections import Counter

import pytest

from deformable_detr.serve.batching import Batcher


class Work:
    """Record batches, double numbers, and block while the gate is closed."""

    def __init__(self):
        self.batches, self.gate = [], threading.Event()
        self.gate.set()

    def __call__(self, payloads):
        self.gate.wait(10)
        self.batches.append(list(payloads))
        if "bad" in payloads:
            raise ValueError("bad")
        return [payload * 2 for payload in payloads]


class AsyncBatcher(Batcher):
    def submit(self, payload, key):
        return asyncio.wrap_future(super().submit(payload, key))


def run(scenario, max_batch_size=4, wait=0.02):
    work = Work()
    batcher = AsyncBatcher(work, max_batch_size, wait)
    batcher.start()
    try:
        asyncio.run(asyncio.wait_for(scenario(batcher, work), 20))
    finally:
        work.gate.set()
        batcher.stop()
    assert not batcher.alive
    return work.batches


async def blocked_thread(batcher, work):
    """Block the thread with one batch, so that later payloads queue up."""
    work.gate.clear()
    first = batcher.submit(-1, "first")
    while len(batcher):
        await asyncio.sleep(0.001)
    return first


def test_equal_keys_share_a_batch_and_the_oldest_runs_first():
    async def scenario(batcher, work):
        first = await blocked_thread(batcher, work)
        waiting = [batcher.submit(number, "even" if number % 2 == 0 else "odd") for number in range(7)]
        work.gate.set()
        assert await asyncio.gather(first, *waiting) == [-2, 0, 2, 4, 6, 8, 10, 12]

    assert run(scenario) == [[-1], [0, 2, 4, 6], [1, 3, 5]]


def test_full_batches():
    async def scenario(batcher, work):
        first = await blocked_thread(batcher, work)
        waiting = [batcher.submit(number, 0) for number in range(10)]
        work.gate.set()
        await asyncio.gather(first, *waiting)

    assert run(scenario)[1:] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_first_payload_waits_a_limited_time():
    async def scenario(batcher, work):
        first = batcher.submit(1, 0)
        await asyncio.sleep(0.05)
        second = batcher.submit(2, 0)
        assert await asyncio.gather(first, second) == [2, 4]
        assert work.batches == [[1, 2]]
        assert await batcher.submit(3, 0) == 6

    assert run(scenario, wait=0.5) == [[1, 2], [3]]


def test_error_fails_only_its_batch():
    async def scenario(batcher, work):
        first = await blocked_thread(batcher, work)
        waiting = [batcher.submit("bad", 0), batcher.submit("good", 0), batcher.submit("other", 1)]
        work.gate.set()
        await first
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [ValueError, ValueError, str]
        assert await batcher.submit(5, 0) == 10

    run(scenario)


def test_canceled_payloads_are_skipped():
    async def scenario(batcher, work):
        first = await blocked_thread(batcher, work)
        waiting = [batcher.submit(number, 0) for number in range(4)]
        waiting[0].cancel()
        waiting[2].cancel()
        await asyncio.sleep(0)
        assert len(batcher) == 2  # canceled payloads are freed
        work.gate.set()
        assert await asyncio.gather(first, waiting[1], waiting[3]) == [-2, 2, 6]

    assert run(scenario)[1:] == [[1, 3]]


def test_stop_finishes_submitted_payloads():
    async def scenario(batcher, work):
        first = await blocked_thread(batcher, work)
        waiting = [batcher.submit(number, number) for number in range(5)]
        stopping = asyncio.ensure_future(asyncio.to_thread(batcher.stop))
        while not batcher._stopping:
            await asyncio.sleep(0.001)
        with pytest.raises(RuntimeError, match="stopped"):
            batcher.submit(9, 0)
        work.gate.set()
        assert await asyncio.gather(first, *waiting) == [-2, 0, 2, 4, 6, 8]
        await stopping

    run(scenario)


def test_many_payloads_get_their_own_results():
    async def scenario(batcher, work):
        numbers = list(range(500))
        results = await asyncio.gather(*(batcher.submit(number, number % 3) for number in numbers))
        assert results == [2 * number for number in numbers]

    batches = run(scenario, max_batch_size=8, wait=0.001)
    assert Counter(number for batch in batches for number in batch) == Counter(range(500))
    assert all(len({number % 3 for number in batch}) == 1 and len(batch) <= 8 for batch in batches)
