"""The detector behind the server: images are read in a pool of threads, one thread runs the model on batches."""

from __future__ import annotations

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
from torch import Tensor, nn

from ..config.image_size import typical_input_size
from ..config.schema import ModelConfig
from ..data.dataloader import collate
from ..data.transforms import resize
from ..model.postprocess import ScoredBoxes, postprocess, to_detections
from ..predict.predictor import evaluating, forward, model_categories
from ..structures import Detections, Target
from ..utils.process import malloc_trim
from .batching import Batcher
from .decoding import LARGE, decode, open_picture
from .limits import HttpError, Limits
from .metrics import Metrics
from .uploads import Upload

_log = logging.getLogger(__name__)
T = TypeVar("T")


class _Image(NamedTuple):
    """pixels: (3, h, w) uint8, resized for the model. size: (height, width) of the original."""

    pixels: Tensor
    size: tuple[int, int]
    top_k: int


class _ExplainJob(NamedTuple):
    """pixels: (3, H, W) uint8, the original."""

    pixels: Tensor
    threshold: float
    top_k: int


class Engine:
    """A model that answers many callers of one event loop at once, each as `model.predict` would answer it alone.

    Images share a batch only where the model sees them at the same size: a canvas with padding would change scores.

    model: what `load_detector` gives. It is put into evaluation mode and belongs to the engine from then on.
    fast: what detects in its place with the same outputs, such as its `optimize()`; the model itself still explains.
    """

    def __init__(self, model: nn.Module, limits: Limits, metrics: Metrics, fast: nn.Module | None = None) -> None:
        from ..detector import DeformableDETR

        self.model, self.limits, self.metrics = model.eval(), limits, metrics
        self.config: ModelConfig = model.config  # pyright: ignore[reportAttributeAccessIssue]
        self.explains = isinstance(model, DeformableDETR)
        self.fast = model if fast is None else fast
        self.categories = model_categories(self.config)
        self._canvas: tuple[int, int] | None = getattr(model, "canvas", None)
        self._batcher = Batcher(self._run, limits.batch, limits.batch_wait, self._warm_up)
        self._taken = self._explaining = 0
        self._seconds = 0.1  # an image takes, lately
        threads = min(8, max(2, _processors()))
        self._readers = ThreadPoolExecutor(threads, "read", _one_thread)
        self._large_reader = ThreadPoolExecutor(1, "read-large", _one_thread)
        self._writer = ThreadPoolExecutor(1, "write", _one_thread)
        metrics.watch(lambda: len(self._batcher), lambda: self._taken)

    def start(self) -> None:
        """Starts the threads and runs the model once; after it answers are quick."""
        self._batcher.start()

    def stop(self) -> None:
        """Ends the threads after what they are doing."""
        self._batcher.stop()
        for pool in (self._readers, self._large_reader, self._writer):
            pool.shutdown(cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Whether the thread that runs the model is there."""
        return self._batcher.alive

    def refuse_if_full(self) -> None:
        """Raises Refused (503) where not even one more image can be taken."""
        if self._taken >= self.limits.waiting:
            raise self._full("all places in the queue are taken")

    async def read(self, work: Callable[..., T], *arguments: Any) -> T:
        """Runs what takes a request apart, in the readers' threads."""
        return await self._in(self._readers, work, *arguments)

    async def write(self, work: Callable[..., T], *arguments: Any) -> T:
        """Runs what puts an answer together, in a thread that no request can keep busy."""
        return await self._in(self._writer, work, *arguments)

    async def detect(self, uploads: Sequence[Upload], threshold: float, top_k: int) -> list[Detections]:
        """What is in each image. Raises Refused, naming the first image that cannot be read."""
        with self._places(len(uploads)):
            read = await _all([self._read(upload, top_k) for upload in uploads])
            waiting = [self._batcher.submit(image, self._canvas or image.pixels.shape) for image in read]
            found = await _all(waiting)
        chosen = zip(found, read, strict=True)
        return [to_detections(selection, image.size, threshold, self.categories) for selection, image in chosen]

    async def explain(self, upload: Upload, threshold: float, top_k: int) -> Any:
        """The `explanation.Trace` of one image. Raises Refused for one that cannot be read."""
        if self._explaining >= self.limits.explaining:
            raise self._full("enough explanations are being made")
        self._explaining += 1
        try:
            with self._places(1):
                pixels = await self._pixels(upload)
                look = _ExplainJob(pixels, threshold, top_k)
                return await self._batcher.submit(look, id(look))
        finally:
            self._explaining -= 1

    @contextmanager
    def _places(self, count: int) -> Iterator[None]:
        if self._taken + count > self.limits.waiting:
            raise self._full("the queue is full")
        self._taken += count
        try:
            yield
        finally:
            self._taken -= count

    def _full(self, why: str) -> HttpError:
        seconds = math.ceil(min(max(self._taken * self._seconds, 1), 30))
        return HttpError(503, f"{why}; try again in {seconds} s", retry_after=seconds)

    async def _read(self, upload: Upload, top_k: int) -> _Image:
        def resized(pixels: Tensor) -> _Image:
            config = self.config
            small = resize(pixels, config.image_size, config.long_side, self._canvas, config.size_divisor)
            return _Image(small, (pixels.shape[1], pixels.shape[2]), top_k)

        return await self._pixels(upload, resized)

    async def _pixels(self, upload: Upload, then: Callable[[Tensor], Any] = lambda pixels: pixels) -> Any:
        """then(the original pixels), worked out where the picture is decoded; all large ones in one thread."""
        began = time.perf_counter()
        image = await self._in(self._readers, open_picture, upload.data, upload.label, self.limits.pixels)
        large = image.width * image.height > LARGE

        def work() -> Any:
            try:
                return then(decode(image, upload.label))
            finally:
                image.close()
                if large:  # hundreds of MiB, kept as the model's buffers are, which nobody may need again
                    malloc_trim()

        result = await self._in(self._large_reader if large else self._readers, work)
        self.metrics.read_seconds.observe(time.perf_counter() - began)
        return result

    @staticmethod
    async def _in(pool: Executor, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)

    def _warm_up(self) -> None:
        side = self.config.image_size
        pixels = torch.zeros(3, *(self._canvas or typical_input_size(self.config)), dtype=torch.uint8)
        began = time.perf_counter()
        self._detect([_Image(pixels, (side, side), 100)])
        self._seconds = time.perf_counter() - began

    def _run(self, payloads: Sequence[Any]) -> Sequence[Any]:
        """Results of a batch, in the model's thread."""
        began = time.perf_counter()
        try:
            results = self._look(payloads[0]) if isinstance(payloads[0], _ExplainJob) else self._detect(payloads)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            _log.exception("the device's memory does not hold a batch of %d", len(payloads))
            raise HttpError(503, "the device's memory is full; try again", retry_after=2) from None
        except Exception:
            _log.exception("a batch of %d failed", len(payloads))
            raise
        took = time.perf_counter() - began
        self._seconds += 0.2 * (took / len(payloads) - self._seconds)
        self.metrics.model_seconds.observe(took)
        self.metrics.batch_images.observe(len(payloads))
        return results

    def _detect(self, images: Sequence[_Image]) -> list[ScoredBoxes]:
        nothing = Target.empty(0, (1, 1))
        batch, _ = collate([(image.pixels, nothing) for image in images])
        with evaluating(self.fast):
            most = max(image.top_k for image in images)
            found = postprocess(forward(self.fast, batch), [image.size for image in images], most)
        # Best first, so the first few are those of a smaller top_k.
        return [
            ScoredBoxes(*(part[: image.top_k] for part in parts)) for image, parts in zip(images, found, strict=True)
        ]

    def _look(self, look: _ExplainJob) -> list[Any]:
        from ..explanation import trace

        return [trace(self.model, look.pixels, look.threshold, look.top_k)]  # pyright: ignore[reportArgumentType]


async def _all(awaitables: Sequence[Any]) -> list[Any]:
    """All results; or the first error by position, the others being canceled or awaited."""
    futures = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        results = await asyncio.gather(*futures, return_exceptions=True)
    finally:
        for future in futures:
            future.cancel()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


_threads = threading.Lock()


def _one_thread() -> None:
    """This thread's own work stays in it: the processors are for the model."""
    with _threads:
        before = torch.get_num_threads()  # settles this thread's number, which would be set at first use otherwise
        torch.set_num_threads(1)
        # New threads take the number that was set last, whoever set it.
        thread = threading.Thread(target=torch.set_num_threads, args=(before,))
        thread.start()
        thread.join()


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
