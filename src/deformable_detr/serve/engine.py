"""The detector behind the server: threads decode images, one thread runs the model on batches."""

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from starlette.exceptions import HTTPException
from torch import Tensor

from ..config.image_size import FitInside, typical_input_size
from ..data.dataloader import pad_images
from ..data.transforms import resize
from ..explanation import Trace, trace
from ..model.postprocess import ScoredBoxes, postprocess, to_detections
from ..predict.predictor import Detector, evaluating, forward, model_categories
from ..structures import Detections
from ..utils.process import malloc_trim
from .batching import Batcher
from .decoding import LARGE_IMAGE, decode, open_image
from .limits import Limits
from .metrics import Metrics
from .uploads import Upload

_log = logging.getLogger(__name__)
T = TypeVar("T")


class _DetectJob(NamedTuple):
    """pixels: (3, h, w) uint8, resized for the model. image_size: (height, width) of the original."""

    pixels: Tensor
    image_size: tuple[int, int]
    threshold: float
    top_k: int


class _ExplainJob(NamedTuple):
    """pixels: (3, H, W) uint8, the original."""

    pixels: Tensor
    threshold: float
    top_k: int


class Engine:
    """A model that serves many requests of one event loop, each with the results of `model.predict` for its image.

    Images share a batch only if they have the same size after resizing: padding would change their scores.

    Args:
        model: A detector from `load_detector`. The engine sets it to evaluation mode.
        limits: The limits of the server.
        detector: Detects instead of the model, with the same outputs, such as `model.optimize()`. Default: the model.

    Attributes:
        readers, writer: Threads that parse requests and decode images, and a thread that builds responses.
        draining: Whether the server is about to shut down: then /readyz answers 503 and responses close their
            connection.
    """

    def __init__(self, model: Detector, limits: Limits, detector: Detector | None = None) -> None:
        self.model = model.eval()
        self.limits, self.metrics = limits, Metrics()
        self.draining = False
        self.config = self.model.config
        self.detector = model if detector is None else detector
        self.categories = model_categories(self.config)
        self._resize = self.model.resize_rule
        self._batcher = Batcher(self._run, limits.max_batch_size, limits.batch_wait, self._warm_up)
        self._accepted, self._explaining = 0, asyncio.Semaphore(limits.max_explanations)
        self._seconds_per_image = 0.1  # moving average
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.readers = ThreadPoolExecutor(min(8, max(2, processors)), "read", _use_one_thread)
        self._large_reader = ThreadPoolExecutor(1, "read-large", _use_one_thread)
        self.writer = ThreadPoolExecutor(1, "write", _use_one_thread)
        self.metrics.queued.set_function(lambda: len(self._batcher))
        self.metrics.accepted.set_function(lambda: self._accepted)
        self.metrics.ready.set_function(lambda: self.alive and not self.draining)

    def start(self) -> None:
        """Start the threads and run the model once, so that the first request is not slow."""
        self._batcher.start()

    def stop(self) -> None:
        """Finish the current work and end the threads."""
        self._batcher.stop()
        for pool in (self.readers, self._large_reader, self.writer):
            pool.shutdown(cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Whether the thread of the model runs."""
        return self._batcher.alive

    def check_capacity(self, images: int = 1) -> None:
        """Raise HTTPException (503) if the queue has no room for this many more images."""
        if self._accepted + images > self.limits.max_queue:
            raise self._overloaded("the queue is full")

    async def detect(self, uploads: Sequence[Upload], threshold: float, top_k: int) -> list[Detections]:
        """Return the detections of each image. Raises HTTPException if one cannot be read."""

        def resized(pixels: Tensor) -> _DetectJob:
            small = resize(pixels, self._resize)
            return _DetectJob(small, (pixels.shape[1], pixels.shape[2]), threshold, top_k)

        with self._reserve(len(uploads)):
            jobs = await _gather([self._decode(upload, resized) for upload in uploads])
            results = await _gather([self._submit(job, self._batch_key(job)) for job in jobs])
            pairs = list(zip(results, jobs, strict=True))
            return await run_in(  # masks take time to encode
                self.writer,
                lambda: [to_detections(boxes, job.image_size, threshold, self.categories) for boxes, job in pairs],
            )

    async def explain(self, upload: Upload, threshold: float, top_k: int) -> Trace:
        """Return the trace of an image. Raises HTTPException if it cannot be read."""
        if self._explaining.locked():
            raise self._overloaded("too many explanations in progress")
        async with self._explaining:
            with self._reserve(1):
                job = await self._decode(upload, lambda pixels: _ExplainJob(pixels, threshold, top_k))
                return await self._submit(job, id(job))

    @contextmanager
    def _reserve(self, images: int) -> Iterator[None]:
        self.check_capacity(images)
        self._accepted += images
        try:
            yield
        finally:
            self._accepted -= images

    def _overloaded(self, reason: str) -> HTTPException:
        seconds = math.ceil(min(max(self._accepted * self._seconds_per_image, 1), 30))
        return HTTPException(503, f"{reason}; try again in {seconds} s", headers={"retry-after": str(seconds)})

    def _submit(self, job: Any, key: Hashable) -> asyncio.Future[Any]:
        return asyncio.wrap_future(self._batcher.submit(job, key))

    async def _decode(self, upload: Upload, convert: Callable[[Tensor], T]) -> T:
        """Decode an image and return convert(pixels). Large images are decoded one at a time."""
        start = time.perf_counter()
        image = await run_in(self.readers, open_image, upload.data, upload.label, self.limits.pixels)
        is_large = image.width * image.height > LARGE_IMAGE

        def work() -> T:
            try:
                return convert(decode(image, upload.label))
            finally:
                image.close()
                if is_large:  # its buffers have hundreds of MiB, which the allocator would keep
                    malloc_trim()

        result = await run_in(self._large_reader if is_large else self.readers, work)
        self.metrics.read_seconds.observe(time.perf_counter() - start)
        return result

    def _batch_key(self, job: "_DetectJob") -> Hashable:
        """Images with equal keys share batches: all if the model pads them to one size anyway."""
        return None if isinstance(self._resize, FitInside) else job.pixels.shape

    def _warm_up(self) -> None:
        pixels = torch.zeros(3, *typical_input_size(self._resize), dtype=torch.uint8)
        start = time.perf_counter()
        self._detect([_DetectJob(pixels, (pixels.shape[1], pixels.shape[2]), 0.0, 100)])
        self._seconds_per_image = time.perf_counter() - start

    def _run(self, jobs: Sequence[Any]) -> Sequence[Any]:
        """Process a batch in the thread of the model."""
        start = time.perf_counter()
        try:
            results = [trace(self.model, *jobs[0])] if isinstance(jobs[0], _ExplainJob) else self._detect(jobs)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            _log.exception("out of device memory for a batch of %d", len(jobs))
            raise HTTPException(503, "out of device memory; try again", headers={"retry-after": "2"}) from None
        except Exception:
            _log.exception("a batch of %d failed", len(jobs))
            raise
        seconds = time.perf_counter() - start
        self._seconds_per_image += 0.2 * (seconds / len(jobs) - self._seconds_per_image)
        self.metrics.model_seconds.observe(seconds)
        self.metrics.batch_images.observe(len(jobs))
        return results

    def _detect(self, jobs: Sequence[_DetectJob]) -> list[ScoredBoxes]:
        with evaluating(self.detector):
            outputs = forward(self.detector, pad_images([job.pixels for job in jobs]))
            sizes, top_k = [job.image_size for job in jobs], max(job.top_k for job in jobs)
            results = postprocess(outputs, sizes, top_k, min(job.threshold for job in jobs))
        # Results are sorted by score, so the first ones are those of a smaller top_k.
        return [boxes.select(slice(job.top_k)) for job, boxes in zip(jobs, results, strict=True)]


async def run_in(pool: Executor, function: Callable[..., T], *arguments: Any) -> T:
    """Run a function in a thread of the pool."""
    return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


async def _gather(awaitables: Sequence[Any]) -> list[Any]:
    """Return all results. After an error or a cancellation, cancel all awaitables."""
    futures = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return await asyncio.gather(*futures)
    finally:
        for future in futures:
            future.cancel()


_thread_setting = threading.Lock()


def _use_one_thread() -> None:
    """Run the work of this thread in this thread alone and leave the processors to the model."""
    with _thread_setting:
        threads = torch.get_num_threads()  # also fixes the number for this thread
        torch.set_num_threads(1)
        # New threads start with the number set last, so another thread restores it.
        restore = threading.Thread(target=torch.set_num_threads, args=(threads,))
        restore.start()
        restore.join()
