"""A run: a pool of workers, kept busy by Ray Data, predicts the units that have no file yet."""

import logging
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, NamedTuple

from ..utils.device import pick_device
from ..utils.errors import UserError, first_line
from ..utils.files import is_exported
from ..utils.process import STOP_SIGNALS
from ..utils.terminal import echo
from .filesystem import OutputFolder
from .manifest import SUCCESS, UNITS, create_manifest, finished_units, lock_output
from .options import PredictDatasetOptions
from .parquet import ImageCounts
from .progress import MAX_WORKER_DEATHS, Progress
from .sources import find_ranges
from .worker import UnitPredictor, WorkerJob, pack_model

CPUS_PER_WORKER = 4  # default, if the machine has as many
START_ATTEMPTS = 4  # of a cluster on this machine


class WorkerResources(NamedTuple):
    """The number of workers, and what each of them gets."""

    workers: int
    num_cpus: float
    num_gpus: float
    device: str


def predict_dataset(
    model: str | os.PathLike[str],
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    options: PredictDatasetOptions | None = None,
    report: Callable[[str], None] = echo,
) -> ImageCounts:
    """Detect the objects in all images of the sources and write them as Parquet files.

    Args:
        model: As for `load_detector`.
        sources: Folders, files, patterns with * and URLs; see `sources.find_ranges`.
        out: Folder or URL. If it holds results of the same run, only the missing units are predicted.
        options: Default: `PredictDatasetOptions()`.
        report: Called with progress lines.

    Returns:
        The number of images, and of those that could not be read, whose rows hold the error.

    Raises:
        UserError: An option or source is invalid, `out` holds results of another run, or units failed.
    """
    options = options or PredictDatasetOptions()
    options.validate()
    if options.device == "mps" and not options.address:  # Ray counts only the other kinds of devices
        pick_device(options.device)
    for package in ("ray", "pyarrow", "pandas"):
        if find_spec(package) is None:
            raise UserError(f"{package} is not installed: pip install 'deformable-detr[dataset]'")
    folder = OutputFolder(os.fspath(out))
    names = [os.fspath(source) for source in sources]
    files, model_hash, masks = pack_model(os.fspath(model))
    with lock_output(folder):
        format, ranges = find_ranges(names, options, folder.url)
        manifest = create_manifest(folder, model_hash, names, ranges, replace(options, format=format), masks)
        progress = Progress(manifest, finished_units(folder, manifest), report)
        missing = progress.missing
        if missing:
            if SUCCESS in folder.list_files():
                folder.delete(SUCCESS)
            _run_units(folder, files, missing, options, progress)
            progress.raise_if_failed()
        folder.delete(UNITS)
        folder.write(SUCCESS, lambda path: path.touch())
    counts = progress.counts
    suffix = "" if missing else "; nothing was left to do"
    report(f"{folder.root}: {counts.images} images, {counts.unreadable} unreadable, {manifest.num_units} files{suffix}")
    return counts


def worker_resources(options: PredictDatasetOptions, cpus: float, gpus: float, fixed_size: bool) -> WorkerResources:
    """Divide a cluster's processors and GPUs among workers.

    Raises:
        UserError: The workers do not fit into a cluster of fixed size, which cannot grow.
    """
    num_gpus, num_cpus = options.num_gpus, options.num_cpus
    if num_gpus is None:
        num_gpus = 1.0 if options.device == "cuda" or (options.device == "auto" and gpus >= 1) else 0.0
    if num_cpus is None:
        num_cpus = 1.0 if num_gpus else float(min(CPUS_PER_WORKER, max(int(cpus), 1)))
    capacity = math.floor(cpus / num_cpus + 1e-9)
    if num_gpus:
        capacity = min(capacity, math.floor(gpus / num_gpus + 1e-9))
    workers = options.concurrency or max(capacity, 1)
    if fixed_size and workers > capacity:
        raise UserError(
            f"{workers} workers with --num-cpus {num_cpus:g} and --num-gpus {num_gpus:g} do not fit this machine's "
            f"{cpus:g} processors and {gpus:g} GPUs: lower one of them or --concurrency"
        )
    device = options.device if options.device != "auto" else ("cuda" if num_gpus else "cpu")
    return WorkerResources(workers, num_cpus, num_gpus, device)


def _run_units(
    out: OutputFolder, files: dict[str, bytes], missing: list[int], options: PredictDatasetOptions, progress: Progress
) -> None:
    """Predict the missing units. Finished units stay, also after an interruption."""
    manifest, report = progress.manifest, progress.report
    if progress.finished:
        report(f"resuming: {len(progress.finished)} of {manifest.num_units} units are finished")
    with _ray_cluster(options, sum(map(len, files.values()))) as (ray, fixed_size):
        cluster = ray.cluster_resources()
        resources = worker_resources(options, cluster.get("CPU", 0), cluster.get("GPU", 0), fixed_size)
        resources = resources._replace(workers=min(resources.workers, len(missing)))
        device, shown_device = resources.device, resources.device
        if options.device == "auto" and device != "cpu" and any(map(is_exported, files)):
            device, shown_device = "auto", f"{device} if the file's runtime supports it"
        workers = f"{resources.workers} worker{'' if resources.workers == 1 else 's'}"
        report(f"{manifest.num_units} units, {workers} on {shown_device}")
        threads = max(1, math.floor(resources.num_cpus))
        job = WorkerJob(out.url, manifest.run_id, manifest.options, device, threads)
        progress.start()
        try:
            for unit, counts, failure in _unit_results(ray, job, files, missing, resources):
                progress.add(unit, counts, failure)
        except (KeyboardInterrupt, SystemExit):  # the command line turns signals into the second
            finished = f"{len(progress.finished)} of {manifest.num_units} units are finished"
            report(f"interrupted: {finished}; run the same command to resume")
            raise
        except ray.exceptions.RayError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise UserError(f"the workers failed: {first_line(lines[-1] if lines else error)}") from None


def _unit_results(
    ray: Any, job: WorkerJob, files: dict[str, bytes], units: list[int], resources: WorkerResources
) -> Iterator[tuple[int, ImageCounts, str]]:
    """Yield unit, counts and failure of each unit in order of completion, except of units whose workers died."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = -1  # a failing unit does not stop the others
    context.target_max_block_size = 2**20  # results are small: reserve little memory for them
    items = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=min(len(units), 10_000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray 2.64 renames the last two options
        results = items.map_batches(
            UnitPredictor,
            fn_constructor_args=(job, ray.put(files)),
            batch_size=1,
            batch_format="numpy",
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus or None,
            compute=ray.data.ActorPoolStrategy(size=resources.workers, max_tasks_in_flight_per_actor=1),
            max_restarts=-1,
            max_task_retries=MAX_WORKER_DEATHS,
        )
    for batch in results.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        for unit, images, unreadable, failure in zip(*(batch[key].tolist() for key in batch), strict=True):
            yield unit, ImageCounts(images, unreadable), failure


@contextmanager
def _ray_cluster(options: PredictDatasetOptions, model_bytes: int) -> Iterator[tuple[Any, bool]]:
    """Connect to Ray, or start it here; yield it and whether the cluster has a fixed size."""
    # Set before the import: no usage statistics, and no output of Ray's own processes.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "CRITICAL")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield ray, False
        return
    arguments: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not options.address:
        memory = options.object_store_memory * 2**20 + model_bytes
        arguments |= {"include_dashboard": False, "object_store_memory": memory}
    for attempt in range(START_ATTEMPTS):
        try:
            with _silent_stderr(), _kept_signal_handlers():
                ray.init(options.address or "local", **arguments)
            break
        except Exception as error:
            ray.shutdown()
            # Ray waits half a minute for its processes, which is short on a busy machine.
            if options.address or "timed out" not in str(error) or attempt == START_ATTEMPTS - 1:
                problem = f"--address {options.address}: no Ray cluster" if options.address else "Ray cannot start"
                raise UserError(f"{problem} ({first_line(error)})") from None
    try:
        yield ray, not options.address
    finally:
        ray.shutdown()


@contextmanager
def _kept_signal_handlers() -> Iterator[None]:
    """Undo that Ray handles SIGTERM: its handler ends the process in the middle of its native code."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discard what Ray's native code writes to standard error."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
