"""Images on their way to the model: read and resized ahead, in batches."""

import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from torch import Tensor

from ..config.image_size import ResizeRule
from ..data.transforms import resize
from ..utils.errors import UserError
from ..utils.images import read_image
from ..utils.large_tiff import LargeTiff, open_image
from ..utils.tiles import Tiling
from .tiles import TiledImage


class InputImage(NamedTuple):
    """An image on its way to the model."""

    image: Any  # for `Detections.image`
    size: tuple[int, int]  # (height, width) as read
    pixels: Tensor | TiledImage | UserError  # a tensor: resized, (3, H, W) uint8


def read_ahead(
    rule: ResizeRule, sources: Iterator[Any], batch_size: int, keep_pixels: bool, tiling: Tiling | None
) -> Generator[InputImage, None, None]:
    """Read and resize the images in order: files in threads, a bounded number ahead; others only when requested."""

    def read(source: Any) -> InputImage:
        try:
            image = read_image(source) if tiling is None else open_image(source)
            kept = image if keep_pixels and isinstance(image, Tensor) else source
            size = image.size if isinstance(image, LargeTiff) else (image.shape[1], image.shape[2])
            if tiling is not None and (isinstance(image, LargeTiff) or tiling.divides(*size)):
                return InputImage(kept, size, TiledImage(image, tiling, rule, source))
        except UserError as error:
            return InputImage(source, (0, 0), error)
        assert isinstance(image, Tensor)
        return InputImage(kept, size, resize(image, rule))

    threads = min(8, max(1, (os.cpu_count() or 1) // 2))
    limit = max(batch_size, threads if keep_pixels else 2 * threads) if tiling is None else 1  # whole images
    pending: deque[Future[InputImage]] = deque()
    pool = ThreadPoolExecutor(threads, "read-image")
    try:
        for source in sources:
            if not isinstance(source, str | os.PathLike):
                while pending:
                    yield pending.popleft().result()
                yield read(source)
                continue
            pending.append(pool.submit(read, source))
            if len(pending) > limit:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def batches(inputs: Iterator[InputImage], size: int) -> Iterator[list[InputImage]]:
    """Yield the images in batches of at most `size`; an image with tiles is a batch of its own."""
    batch: list[InputImage] = []
    for item in inputs:
        tiled = isinstance(item.pixels, TiledImage)
        if batch and tiled:
            yield batch
            batch = []
        batch.append(item)
        del item  # before the next one is read
        if tiled or len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
