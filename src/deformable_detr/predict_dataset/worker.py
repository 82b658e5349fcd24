"""A worker: a model in memory that predicts one unit after another."""

import hashlib
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..predict.predictor import predict_each
from ..structures import Detections
from ..utils.errors import UserError, first_line
from .filesystem import OutputFolder
from .manifest import read_unit
from .options import PredictDatasetOptions
from .parquet import read_part, result_row, write_part
from .sources import SourceImage, read_range

Pixels = Tensor | Path | str  # (3, H, W) uint8, a TIFF that is larger than memory, or an error


@dataclass(frozen=True)
class WorkerJob:
    """What every worker of a run needs."""

    out: str  # path or URL
    run_id: str
    options: PredictDatasetOptions
    device: str
    threads: int  # of the model, on the CPU


def pack_model(source: str) -> tuple[dict[str, bytes], str, bool]:
    """Return the content of a detector's files by name, their hash, and whether it predicts masks.

    All workers then use the same weights and need no access to the files. Raises UserError if it cannot be loaded.
    """
    from ..detector import load_detector
    from ..utils.files import is_exported, read_json
    from ..weights.native import CONFIG, FORMAT, WEIGHTS

    detector: Any = load_detector(source, "cpu")
    path = Path(source)
    if is_exported(source):
        paths = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
        files = {f"model{path.suffix}": path.read_bytes() for path in paths}
    elif (path / CONFIG).is_file() and read_json(path / CONFIG).get("format") == FORMAT:
        # Saving it again would change the hash in a later version with new config fields.
        files = {name: (path / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    else:
        with tempfile.TemporaryDirectory() as folder:
            detector.save_pretrained(folder)
            saved = [file for file in Path(folder).iterdir() if file.suffix != ".md"]  # without the model card
            files = {file.name: file.read_bytes() for file in saved}
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return files, digest.hexdigest(), detector.config.masks


def unpack_model(files: Mapping[str, bytes], device: str, threads: int) -> Any:
    """Load the detector of `pack_model` on a device."""
    from ..detector import load_detector
    from ..runtimes.detector import load_exported
    from ..utils.files import is_exported

    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        for name in files:
            if is_exported(name):
                return load_exported(Path(folder) / name, device, threads)
        return load_detector(folder, device, "fp32")


class UnitPredictor:
    """Predict units for Ray Data: called with {"unit": numbers}, write their files and report the results.

    `model` is the files of `pack_model`, or Ray's reference to them.
    """

    def __init__(self, job: WorkerJob, model: Any) -> None:
        if not isinstance(model, Mapping):
            import ray

            model = ray.get(model)
        torch.set_num_threads(job.threads)
        self.job, self.out = job, OutputFolder(job.out)
        self.model = unpack_model(model, job.device, job.threads)
        self.readers = ThreadPoolExecutor(job.options.readers, "reader")

    def __call__(self, batch: Mapping[str, Iterable[int]]) -> dict[str, list[Any]]:
        reports = [(int(unit), *self.predict_unit(int(unit))) for unit in batch["unit"]]
        names = ("unit", "images", "unreadable", "failure")
        return dict(zip(names, map(list, zip(*reports, strict=True)), strict=True))

    def predict_unit(self, unit: int) -> tuple[int, int, str]:
        """Return the numbers of images and of unreadable ones, and why the unit failed, or ""."""
        try:
            part = read_part(self.out, unit)  # written by a worker that died before it could report
            if part is not None and part[0] == self.job.run_id:
                counts = part[1]
            else:
                counts = write_part(self.out, unit, self.job.run_id, self._rows(unit), self.model.config.masks)
            return counts.images, counts.unreadable, ""
        except torch.OutOfMemoryError:
            return 0, 0, "out of GPU memory: lower --batch-size, which starts a new run"
        except Exception as error:  # reported at the end of the run; other units continue
            return 0, 0, f"{type(error).__name__}: {first_line(error)}"

    def _rows(self, unit: int) -> Iterator[dict[str, Any]]:
        """Yield a row per image in the order of the source. Batches never span units, so that rows are reproducible."""
        options = self.job.options
        images = (image for source in read_unit(self.out, unit) for image in read_range(source, options))
        batch: list[tuple[SourceImage, Pixels]] = []
        readable = 0
        for image, pixels in self._decoded(images):
            batch.append((image, pixels))
            readable += not isinstance(pixels, str)
            if readable == options.batch_size or len(batch) >= 64 * options.batch_size:
                yield from self._predicted(batch)
                batch, readable = [], 0
        yield from self._predicted(batch)

    def _decoded(self, images: Iterator[SourceImage]) -> Iterator[tuple[SourceImage, Pixels]]:
        """Yield each image with its pixels (3, H, W) uint8, or an error; decode at most one batch ahead."""
        limit = self.job.options.readers + self.job.options.batch_size
        pending: deque[tuple[SourceImage, Future[Pixels]]] = deque()
        while True:
            submitted = ((image, self.readers.submit(_decode, image)) for image in images)
            pending.extend(islice(submitted, limit - len(pending)))
            if not pending:
                return
            image, pixels = pending.popleft()
            yield image, pixels.result()

    def _predicted(self, batch: list[tuple[SourceImage, Pixels]]) -> Iterator[dict[str, Any]]:
        """Yield the rows of a batch. Only images of one size share a forward pass: padding would change scores."""
        options = self.job.options
        indices_by_size: dict[Any, list[int]] = {}
        for index, (_, pixels) in enumerate(batch):
            if not isinstance(pixels, str):
                size = pixels.shape if isinstance(pixels, Tensor) else pixels
                indices_by_size.setdefault(size, []).append(index)
        results: dict[int, Detections | UserError] = {}
        settings = options.threshold, options.top_k, options.batch_size
        for indices in indices_by_size.values():
            pixels = [batch[index][1] for index in indices]
            detections = predict_each(self.model, pixels, *settings, tiling=options.tiling)
            results.update(zip(indices, detections, strict=True))
        for index, (image, pixels) in enumerate(batch):
            result = pixels if isinstance(pixels, str) else results[index]
            yield result_row(image.image, image.key, str(result) if isinstance(result, UserError) else result)


def _decode(image: SourceImage) -> Pixels:
    if image.load is None:
        return image.error or "cannot be read"
    try:
        return image.load()
    except UserError as error:
        return str(error)
