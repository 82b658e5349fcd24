"""The detector behind the server: threads decode images, one thread runs the model on batches."""

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from starlette.exceptions import HTTPException
from torch import Tensor

from ..config.image_size import FitInside, typical_input_size
from ..data.dataloader import pad_images
from ..data.transforms import resize
from ..explanation import Trace, trace
from ..model.postprocess import ScoredBoxes, postprocess, to_detections
from ..predict.predictor import Detector, evaluating, forward, model_categories
from ..predict.tiles import TiledImage, merge, place
from ..structures import Detections
from ..utils.process import malloc_trim
from ..utils.tiles import Tiling, Window
from .batching import Batcher
from .decoding import LARGE_IMAGE, decode, open_image
from .limits import Limits, Shares
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
        tiling: How larger images are cut unless a request says otherwise. Default: not at all.

    Attributes:
        readers, writer: Threads that parse requests and decode images, and a thread that builds responses.
        draining: Whether the server is about to shut down: then /readyz answers 503 and responses close their
            connection.
    """

    def __init__(
        self, model: Detector, limits: Limits, detector: Detector | None = None, tiling: Tiling | None = None
    ) -> None:
        self.model = model.eval()
        self.limits, self.metrics, self._tiling = limits, Metrics(), tiling
        self.draining = False
        self.config = self.model.config
        self.detector = model if detector is None else detector
        self.categories = model_categories(self.config)
        self._resize = self.model.resize_rule
        self._batcher = Batcher(self._run, limits.max_batch_size, limits.batch_wait)
        self._images = Shares(max(limits.max_queue, limits.images))
        self._large_images = Shares(max(limits.max_queue, limits.images * (limits.pixels // LARGE_IMAGE)))
        self._explaining = asyncio.Semaphore(limits.max_explanations)
        self._cutting = asyncio.Semaphore(limits.max_explanations)
        self._seconds_per_image = 0.1  # moving average
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.readers = ThreadPoolExecutor(min(8, max(2, processors)), "read", _use_one_thread)
        self._large_reader = ThreadPoolExecutor(1, "read-large", _use_one_thread)
        self.writer = ThreadPoolExecutor(1, "write", _use_one_thread)
        self.metrics.queued.set_function(lambda: len(self._batcher))
        self.metrics.accepted.set_function(lambda: self._images.total() + self._large_images.total())
        self.metrics.ready.set_function(lambda: self.alive and not self.draining)

    def start(self) -> None:
        """Start the threads and run the model once, so that the first request is not slow."""
        self._batcher.start()
        pixels = torch.zeros(3, *typical_input_size(self._resize), dtype=torch.uint8)
        self._batcher.submit(_DetectJob(pixels, (pixels.shape[1], pixels.shape[2]), 0.0, 100), None).result()

    def stop(self) -> None:
        """Finish the current work and end the threads."""
        self._batcher.stop()
        for pool in (self.readers, self._large_reader, self.writer):
            pool.shutdown(cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Whether the thread of the model runs."""
        return self._batcher.alive

    def check_capacity(self, client: str) -> None:
        """Raise HTTPException (503) if the queue has no room for an image of this client."""
        if not self._images.allows(client, 1):
            raise self._overloaded("the queue is full")

    async def detect(
        self, uploads: Sequence[Upload], threshold: float, top_k: int, client: str, tiling: Tiling | None = None
    ) -> list[Detections]:
        """Return the detections of each image. Raises HTTPException if one cannot be read or the queue is full.

        With `tiling`, default that of the engine, larger images are cut into tiles, with `top_k` detections each.
        """
        tiling = tiling or self._tiling
        images = await _gather([self._open(upload) for upload in uploads])
        opened = list(zip(images, uploads, strict=True))
        with self._reserve(client, images):
            if tiling is not None and any(tiling.divides(*image.size) for image in images):
                self._check_tiles(opened, tiling)
                async with self._cutting:  # each holds a whole image
                    return [await self._detect_tiles(*pair, tiling, threshold, top_k) for pair in opened]

            def resized(pixels: Tensor) -> _DetectJob:
                small = resize(pixels, self._resize)
                return _DetectJob(small, (pixels.shape[1], pixels.shape[2]), threshold, top_k)

            jobs = await _gather([self._decode(image, upload.label, resized) for image, upload in opened])
            pairs = list(zip(await self._submit(jobs), jobs, strict=True))
            return await run_in(  # masks take time to encode
                self.writer,
                lambda: [to_detections(boxes, job.image_size, threshold, self.categories) for boxes, job in pairs],
            )

    def _check_tiles(self, opened: Sequence[tuple[Image.Image, Upload]], tiling: Tiling) -> None:
        for image, upload in opened:
            if (count := tiling.count(*image.size)) > self.limits.tiles:
                reason = f"{upload.label}: {count} tiles; an image may have {self.limits.tiles}: use larger ones"
                raise HTTPException(422, reason)
        if self._cutting.locked():
            raise self._overloaded("too many images with tiles in progress")

    async def _detect_tiles(
        self, image: Image.Image, upload: Upload, tiling: Tiling, threshold: float, top_k: int
    ) -> Detections:
        """Return the detections of one image; its tiles enter the queue a batch at a time, between other images."""
        pixels = await self._decode(image, upload.label, lambda pixels: pixels)
        size = pixels.shape[1], pixels.shape[2]
        view = TiledImage(pixels, tiling, self._resize)
        windows, step, parts = view.windows, self.limits.max_batch_size, []
        if not tiling.divides(*size):
            windows = windows[-1:]

        def jobs_of(chosen: Sequence[Window]) -> list[_DetectJob]:
            return [
                _DetectJob(view.pixels(window), (window.height, window.width), threshold, top_k) for window in chosen
            ]

        def placed(results: Sequence[ScoredBoxes], chosen: Sequence[Window]) -> list[ScoredBoxes]:
            return [place(*pair, size, threshold) for pair in zip(results, chosen, strict=True)]

        for start in range(0, len(windows), step):
            chosen = windows[start : start + step]
            results = await self._submit(await run_in(self.readers, jobs_of, chosen))
            parts += await run_in(self.writer, placed, results, chosen)
        return await run_in(self.writer, lambda: to_detections(merge(parts, windows), size, threshold, self.categories))

    async def _submit(self, jobs: Sequence[_DetectJob]) -> list[ScoredBoxes]:
        any_size = isinstance(self._resize, FitInside)  # the model pads all images to one size anyway
        futures = [self._batcher.submit(job, any_size or job.pixels.shape) for job in jobs]
        return await _gather([asyncio.wrap_future(future) for future in futures])

    async def explain(self, upload: Upload, threshold: float, top_k: int, client: str) -> Trace:
        """Return the trace of an image. Raises HTTPException if it cannot be read or the queue is full."""
        if self._explaining.locked():
            raise self._overloaded("too many explanations in progress")
        async with self._explaining:
            with self._reserve(client, [image := await self._open(upload)]):
                job = await self._decode(image, upload.label, lambda pixels: _ExplainJob(pixels, threshold, top_k))
                return await asyncio.wrap_future(self._batcher.submit(job, id(job)))

    @contextmanager
    def _reserve(self, client: str, images: Sequence[Image.Image]) -> Iterator[None]:
        """Hold places. Large images take places of their own, by their pixels, so that others pass them."""
        large = [math.prod(image.size) // LARGE_IMAGE for image in images if math.prod(image.size) > LARGE_IMAGE]
        demand = ((self._images, len(images) - len(large)), (self._large_images, sum(large)))
        if not all(queue.allows(client, places) for queue, places in demand if places):
            raise self._overloaded("the queue is full")
        for queue, places in demand:
            queue.add(client, places)
        try:
            yield
        finally:
            for queue, places in demand:
                queue.add(client, -places)

    def _overloaded(self, reason: str) -> HTTPException:
        seconds = math.ceil(min(max(self._images.total() * self._seconds_per_image, 1), 30))
        return HTTPException(503, f"{reason}; try again in {seconds} s", headers={"retry-after": str(seconds)})

    async def _open(self, upload: Upload) -> Image.Image:
        return await run_in(self.readers, open_image, upload.data, upload.label, self.limits.pixels)

    async def _decode(self, image: Image.Image, name: str, convert: Callable[[Tensor], T]) -> T:
        """Return convert(pixels). Large images are decoded one at a time."""
        start, is_large = time.perf_counter(), math.prod(image.size) > LARGE_IMAGE

        def work() -> T:
            try:
                return convert(decode(image, name))
            finally:
                image.close()
                if is_large:  # its buffers have hundreds of MiB, which the allocator would keep
                    malloc_trim()

        result = await run_in(self._large_reader if is_large else self.readers, work)
        self.metrics.read_seconds.observe(time.perf_counter() - start)
        return result

    def _run(self, jobs: Sequence[Any]) -> Sequence[Any]:
        """Process a batch in the thread of the model."""
        start = time.perf_counter()
        try:
            results = [trace(self.model, *jobs[0])] if isinstance(jobs[0], _ExplainJob) else self._detect(jobs)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            _log.exception("out of device memory for a batch of %d", len(jobs))
            raise HTTPException(503, "out of device memory; try again", headers={"retry-after": "2"}) from None
        seconds = time.perf_counter() - start
        self._seconds_per_image += 0.2 * (seconds / len(jobs) - self._seconds_per_image)
        self.metrics.model_seconds.observe(seconds)
        self.metrics.batch_images.observe(len(jobs))
        return results

    def _detect(self, jobs: Sequence[_DetectJob]) -> list[ScoredBoxes]:
        with evaluating(self.detector):
            outputs = forward(self.detector, pad_images([job.pixels for job in jobs]))
            sizes, nms_iou = [job.image_size for job in jobs], self.detector.config.nms_iou
            top_k, threshold = max(job.top_k for job in jobs), min(job.threshold for job in jobs)
            results = postprocess(outputs, sizes, top_k, threshold, nms_iou)
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
