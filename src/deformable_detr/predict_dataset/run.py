"""A run: the units that have no file yet, through a pool of workers that Ray Data keeps busy."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple

from ..utils.device import pick_device
from ..utils.errors import UserError
from ..utils.files import is_exported
from .filesystem import Store, one_line, resolve, same
from .manifest import DONE, Plan, finished, held, make_plan
from .options import PredictDatasetOptions
from .parquet import Counts
from .sources import Columns, find_pieces
from .worker import Job, UnitPredictor, pack_model

WORKER_THREADS = 4  # of a processor, where the machine has so many and nothing else is asked for
DEATHS = 2  # times that a unit is tried again after its worker died
FAILURES = 10  # units that fail without one succeeding in between: what follows would fail too
STARTS = 4  # times that a cluster of our own is started before that is given up


class Share(NamedTuple):
    """What `Pool` comes to on a machine."""

    workers: int
    num_cpus: float
    num_gpus: float
    device: str


def predict_dataset(
    model: str | os.PathLike[str],
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    options: PredictDatasetOptions | None = None,
    report: Callable[[str], None] = print,
) -> Counts:
    """Finds the objects in all images of the sources and writes them as Parquet files into the folder `out`.

    model: what `predict` takes. sources, form, image_column, id_column: see `sources.find_pieces`. out: a folder, or a
    prefix in an object store; where it has results of the same run, only what is missing is done.
    threshold, top_k, batch_size: as `predict`. unit_size: images of one file, and what is lost at most by each worker
    when the run is stopped; of shards it may be more, see `sources.PIECE`.
    report: gets a line for each step and every few seconds.

    Returns the number of all images and of those that could not be read, whose rows tell why.

    Raises:
        UserError: For anything the caller can mend, before the first unit where possible; and at the end where units
            could not be done. Results of another run in `out` are refused.
    """
    options = options or PredictDatasetOptions()
    options.validate()
    if options.device == "mps" and not options.address:  # Ray knows the other devices of the machine
        pick_device(options.device)
    for package in ("ray", "pyarrow", "pandas"):
        if find_spec(package) is None:
            raise UserError(f"{package} is not installed: pip install 'deformable-detr[dataset]'")
    store = Store(os.fspath(out))
    names = [os.fspath(source) for source in sources]
    for name in names:
        system, path = resolve(name)
        if type(system) is type(store.system) and same(system, path.rstrip("/"), store.root):
            raise UserError(f"--out {out}: is the source {name} itself; name a folder for the results alone")
    files, digest = pack_model(os.fspath(model))
    with held(store):
        kind, pieces = find_pieces(
            names, options.format, Columns(options.image_column, options.id_column), skip=store.root
        )
        plan = make_plan(
            store, digest, names, pieces, options.unit_size, kind=kind, threshold=options.threshold,
            top_k=options.top_k, batch_size=options.batch_size,
            image_column=options.image_column, id_column=options.id_column,
        )  # fmt: skip
        done = finished(store, plan)
        missing = [unit for unit in range(plan.units) if unit not in done]
        progress = Progress(plan, done, report)
        if missing:
            if DONE in store.names():
                store.remove(DONE)
            _work(store, plan, files, missing, options, progress)
            progress.finish()
        store.put(DONE, lambda path: path.touch())
    counts = progress.counts
    again = "" if missing else "; all was done before"
    report(f"{store.root}: {counts.images} images, {counts.bad} of them unreadable, in {plan.units} files{again}")
    return counts


def share(options: PredictDatasetOptions, cpus: float, gpus: float, own: bool) -> Share:
    """What each worker gets of so many processors and GPUs; own: a cluster of our own, which does not grow.

    Raises UserError where a worker would wait for ever for what is not there.
    """
    num_gpus = options.num_gpus
    if num_gpus is None:
        num_gpus = 1.0 if options.device == "cuda" or (options.device == "auto" and gpus >= 1) else 0.0
    num_cpus = options.num_cpus
    if num_cpus is None:
        num_cpus = 1.0 if num_gpus else float(min(WORKER_THREADS, max(int(cpus), 1)))
    fitting = math.floor(cpus / num_cpus + 1e-9)
    if num_gpus:
        fitting = min(fitting, math.floor(gpus / num_gpus + 1e-9))
    workers = options.concurrency or max(fitting, 1)
    if own and workers > fitting:
        raise UserError(
            f"{workers} workers of --num-cpus {num_cpus:g} and --num-gpus {num_gpus:g} do not fit this machine's "
            f"{cpus:g} processors and {gpus:g} GPUs: lower one of them or --concurrency"
        )
    device = options.device if options.device != "auto" else ("cuda" if num_gpus else "cpu")
    return Share(workers, num_cpus, num_gpus, device)


@dataclass
class Progress:
    """Counts what is done and says so every few seconds."""

    plan: Plan
    done: dict[int, Counts]
    report: Callable[[str], None]
    every: float = 10.0
    failures: dict[int, str] = field(default_factory=dict)
    in_a_row: int = 0

    def __post_init__(self) -> None:
        self.started = self.said = time.monotonic()
        self.before = self.counts

    @property
    def counts(self) -> Counts:
        return Counts(sum(c.images for c in self.done.values()), sum(c.bad for c in self.done.values()))

    def add(self, unit: int, counts: Counts, failure: str) -> None:
        """One unit's report. Raises UserError where nothing succeeds any more."""
        if failure:
            self.failures[unit] = failure
            self.in_a_row += 1
            if self.in_a_row >= FAILURES and len(self.failures) > len(self.done):
                raise UserError(f"stopped, since {self.in_a_row} units failed one after the other: {failure}")
            return
        self.done[unit], self.in_a_row = counts, 0
        if time.monotonic() - self.said >= self.every:
            self.said = time.monotonic()
            self.report(self.line())

    def line(self) -> str:
        """Such as "12000 of 50000 images, 3 unreadable, 41.0 a second, about 0:15:27 left"."""
        counts = self.counts
        elapsed = max(time.monotonic() - self.started, 1e-3)
        new, units = counts.images - self.before.images, len(self.done)
        total = "" if self.plan.images is None else f" of {self.plan.images}"
        left = ""
        if new:
            share_done = units / self.plan.units if self.plan.images is None else counts.images / self.plan.images
            share_new = share_done * new / max(counts.images, 1)
            seconds = int((1 - share_done) * elapsed / max(share_new, 1e-9))
            left = f", about {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
        return f"{counts.images}{total} images, {counts.bad} unreadable, {new / elapsed:.1f} a second{left}"

    def finish(self) -> None:
        """Raises UserError where units are missing."""
        missing = [unit for unit in range(self.plan.units) if unit not in self.done]
        if missing:
            why = self.failures.get(missing[0], f"its worker died {DEATHS + 1} times")
            raise UserError(
                f"{len(missing)} of {self.plan.units} units failed, first unit {missing[0]}: {why}; "
                "the same command tries them again"
            )


def _work(
    store: Store,
    plan: Plan,
    files: dict[str, bytes],
    missing: list[int],
    options: PredictDatasetOptions,
    progress: Progress,
) -> None:
    """Has the missing units done. Raises KeyboardInterrupt when stopped; what is finished stays."""
    if progress.done:
        progress.report(f"going on: {len(progress.done)} of {plan.units} units are done")
    with _cluster(options, sum(map(len, files.values()))) as (ray, own):
        resources = ray.cluster_resources()
        chosen = share(options, resources.get("CPU", 0), resources.get("GPU", 0), own)
        workers = min(chosen.workers, len(missing))
        device, where = chosen.device, chosen.device
        if options.device == "auto" and device != "cpu" and any(map(is_exported, files)):
            device, where = "auto", f"{device} where the file's runtime has it"
        progress.report(f"{plan.units} units, {workers} {'worker' if workers == 1 else 'workers'} on {where}")
        job = Job(
            store.root if store.local else store.system.unstrip_protocol(store.root), plan.run, plan.settings,
            device, max(1, math.floor(chosen.num_cpus)), options.readers,
        )  # fmt: skip
        progress.started = progress.said = time.monotonic()
        try:
            for report in _reports(ray, job, files, missing, chosen._replace(workers=workers)):
                progress.add(*report)
        except KeyboardInterrupt:
            progress.report(f"stopped: {len(progress.done)} of {plan.units} units are done; the same command goes on")
            raise
        except ray.exceptions.RayError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise UserError(f"the workers failed: {one_line(ValueError(lines[-1] if lines else error))}") from None


def _reports(
    ray: Any, job: Job, files: dict[str, bytes], units: list[int], chosen: Share
) -> Iterator[tuple[int, Counts, str]]:
    """Unit, counts and failure of each unit as it ends, in any order. Left out: what keeps killing its workers."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = -1  # one that cannot be done does not stop the others
    context.target_max_block_size = 2**20  # reports are small: let Ray reserve no more for them
    items = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=min(len(units), 10_000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray 2.64 is to name the last two options anew
        results = items.map_batches(
            UnitPredictor,
            fn_constructor_args=(job, ray.put(files)),
            batch_size=1,
            batch_format="numpy",
            num_cpus=chosen.num_cpus,
            num_gpus=chosen.num_gpus or None,
            compute=ray.data.ActorPoolStrategy(size=chosen.workers, max_tasks_in_flight_per_actor=1),
            max_restarts=-1,
            max_task_retries=DEATHS,
        )
    for batch in results.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        for unit, images, bad, failure in zip(*(batch[key].tolist() for key in batch), strict=True):
            yield unit, Counts(images, bad), failure


@contextmanager
def _cluster(options: PredictDatasetOptions, model_bytes: int) -> Iterator[tuple[Any, bool]]:
    """Ray, connected, and whether the cluster is ours; left as it was found."""
    # Before the import: Ray tells its makers of its use unless told otherwise, and says much about itself.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "CRITICAL")  # what fails is said at the end, in a line
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield ray, False
        return
    arguments: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not options.address:
        memory = options.object_store_memory * 2**20 + model_bytes
        arguments |= {"include_dashboard": False, "object_store_memory": memory}
    for attempt in range(STARTS):
        try:
            with _silence():
                ray.init(options.address or "local", **arguments)
            break
        except Exception as error:  # no one there, another version, no room for its shared memory, …
            ray.shutdown()
            # Ray gives its own processes half a minute, which is short on a machine that is busy.
            if options.address or "timed out" not in str(error) or attempt == STARTS - 1:
                where = f"--address {options.address}: no cluster there" if options.address else "Ray cannot start here"
                raise UserError(f"{where} ({one_line(error)})") from None
    try:
        yield ray, not options.address
    finally:
        ray.shutdown()


@contextmanager
def _silence() -> Iterator[None]:
    """Without what Ray's own code writes past Python to standard error when it starts."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
