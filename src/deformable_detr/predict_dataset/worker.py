"""One worker: a model in memory that predicts units, one after the other."""

from __future__ import annotations

import hashlib
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..predict.predictor import predict_iter
from ..structures import Detections
from ..utils.errors import UserError
from .filesystem import Store, one_line
from .manifest import Settings, read_unit
from .parquet import read_part, row, write_part
from .sources import Record, read_piece


@dataclass(frozen=True)
class Job:
    """What every worker of a run needs to know.

    out: the results' folder. run: see `Plan`. threads: of the processor, for the model. readers: threads that decode.
    """

    out: str
    run: str
    settings: Settings
    device: str
    threads: int
    readers: int


def pack_model(source: str) -> tuple[dict[str, bytes], str]:
    """A detector's files by name, as workers get them, and their hash.

    source: what `load_detector` takes. The workers of a run need no way to it, and they all have the same weights even
    if a training run writes better ones there meanwhile. Raises UserError.
    """
    from ..detector import load_detector
    from ..utils.files import is_exported, read_json
    from ..weights.native import CONFIG, FORMAT, WEIGHTS

    detector = load_detector(source, "cpu")
    path = Path(source)
    if is_exported(source):
        files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
        packed = {f"model{file.suffix}": file.read_bytes() for file in files}
    elif (path / CONFIG).is_file() and read_json(path / CONFIG).get("format") == FORMAT:
        # As they are: written anew they would be another model as soon as a release has another setting.
        packed = {name: (path / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    else:
        with tempfile.TemporaryDirectory() as folder:
            detector.save_pretrained(folder)
            packed = {name: (Path(folder) / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    whole = hashlib.sha256()
    for name, data in sorted(packed.items()):
        whole.update(f"{name}\0{len(data)}\0".encode())
        whole.update(data)
    return packed, whole.hexdigest()


def unpack_model(files: Mapping[str, bytes], device: str, threads: int) -> Any:
    """The detector of `pack_model`, on `device`."""
    from ..detector import load_detector
    from ..runtimes.detector import load_exported
    from ..utils.files import is_exported

    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        for name in files:
            if is_exported(name):
                return load_exported(Path(folder) / name, device, threads)
        return load_detector(folder, device, "fp32")


class UnitPredictor:
    """Predicts units for Ray Data: called with {"unit": numbers}, it writes their files and says what became of them.

    model: what `pack_model` gives, or Ray's reference to it.
    """

    def __init__(self, job: Job, model: Any) -> None:
        if not isinstance(model, Mapping):
            import ray

            model = ray.get(model)
        torch.set_num_threads(job.threads)
        self.job, self.store = job, Store(job.out)
        self.model = unpack_model(model, job.device, job.threads)
        self.readers = ThreadPoolExecutor(job.readers, "reader")

    def __call__(self, batch: Mapping[str, Iterable[int]]) -> dict[str, list[Any]]:
        reports = [(int(unit), *self.run(int(unit))) for unit in batch["unit"]]
        return dict(zip(("unit", "images", "bad", "failure"), map(list, zip(*reports, strict=True)), strict=True))

    def run(self, unit: int) -> tuple[int, int, str]:
        """Images, bad ones, and why the unit could not be done, or nothing."""
        try:
            part = read_part(self.store, unit)  # done by a worker that died before it could say so
            if part is not None and part[0] == self.job.run:
                return part[1].images, part[1].bad, ""
            done = write_part(self.store, unit, self.job.run, self.rows(unit))
            return done.images, done.bad, ""
        except torch.OutOfMemoryError:
            return 0, 0, "out of GPU memory: lower --batch-size, which makes it another run"
        except Exception as error:  # whatever it is, the other units go on, and the run names it at its end
            return 0, 0, f"{type(error).__name__}: {one_line(error)}"

    def rows(self, unit: int) -> Iterator[dict[str, Any]]:
        """A row of each image, in the source's order. Batches never cross units: its rows are always the same."""
        settings = self.job.settings
        records = (
            record
            for piece in read_unit(self.store, unit)
            for record in read_piece(piece, settings.kind, settings.columns)
        )
        waiting: list[tuple[Record, Tensor | str]] = []
        good = 0
        for record, image in self.decoded(records):
            waiting.append((record, image))
            good += isinstance(image, Tensor)
            if good == settings.batch_size or len(waiting) >= 64 * settings.batch_size:
                yield from self.predicted(waiting)
                waiting, good = [], 0
        yield from self.predicted(waiting)

    def decoded(self, records: Iterable[Record]) -> Iterator[tuple[Record, Tensor | str]]:
        """Each record's image, (3, H, W) uint8, or what is wrong with it. Some are read ahead, a batch at most."""
        ahead = self.job.readers + self.job.settings.batch_size
        queue: deque[tuple[Record, Future[Tensor | str]]] = deque()
        for record in records:
            queue.append((record, self.readers.submit(_image, record)))
            if len(queue) >= ahead:
                first, image = queue.popleft()
                yield first, image.result()
        while queue:
            first, image = queue.popleft()
            yield first, image.result()

    def predicted(self, images: list[tuple[Record, Tensor | str]]) -> Iterator[dict[str, Any]]:
        """The rows of one batch. Images of one size go through the model together: padding would move their scores."""
        settings = self.job.settings
        alike: dict[torch.Size, list[int]] = {}
        for index, (_, image) in enumerate(images):
            if isinstance(image, Tensor):
                alike.setdefault(image.shape, []).append(index)
        results: dict[int, Detections] = {}
        for indices in alike.values():
            some = [images[index][1] for index in indices]
            found = predict_iter(self.model, some, settings.threshold, settings.top_k, settings.batch_size)
            results.update(zip(indices, found, strict=True))
        for index, (record, image) in enumerate(images):
            yield row(record.image, record.key, image if isinstance(image, str) else results[index])


def _image(record: Record) -> Tensor | str:
    if record.load is None:
        return record.error or "cannot be read"
    try:
        return record.load()
    except UserError as error:
        return str(error)
