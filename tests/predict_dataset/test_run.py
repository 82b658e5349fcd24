"""Complete runs: interrupted or killed runs resume to the same results, without duplicates. Slow tests use Ray."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from deformable_detr.cli import main
from deformable_detr.predict_dataset import progress as progress_module
from deformable_detr.predict_dataset import run as runs
from deformable_detr.predict_dataset.manifest import Manifest
from deformable_detr.predict_dataset.options import PredictDatasetOptions as Options
from deformable_detr.predict_dataset.parquet import ImageCounts, read_note
from deformable_detr.predict_dataset.progress import MAX_WORKER_DEATHS, Progress
from deformable_detr.predict_dataset.run import WorkerResources, predict_dataset, worker_resources
from deformable_detr.predict_dataset.worker import UnitPredictor
from deformable_detr.utils.errors import UserError
from tests.support.image_sources import BAD, as_folder, as_parquet, as_tar, encoded_images, read_rows
from tests.support.models import tiny

FILES = list(encoded_images())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(folder)
    return folder


class RayError(Exception):
    pass


@pytest.fixture
def local_worker(monkeypatch):
    """Replace Ray by one worker in this process; `before` is called with each unit before it is processed."""
    worker = SimpleNamespace(before=lambda unit: None, done=[])

    @contextlib.contextmanager
    def cluster(pool, model_bytes):
        yield (
            SimpleNamespace(cluster_resources=lambda: {"CPU": 2.0}, exceptions=SimpleNamespace(RayError=RayError)),
            True,
        )

    def unit_results(ray, job, files, units, resources):
        predictor = UnitPredictor(job, files)
        for unit in units:
            worker.before(unit)
            images, bad, failure = predictor.predict_unit(unit)
            worker.done.append(unit)
            yield unit, ImageCounts(images, bad), failure

    monkeypatch.setattr(runs, "_ray_cluster", cluster)
    monkeypatch.setattr(runs, "_unit_results", unit_results)
    return worker


def predict(model, source, out, lines=None, **options):
    options = {"threshold": 0.01, "top_k": 5, "batch_size": 2, "unit_size": 4, **options}
    report = (lambda line: None) if lines is None else lines.append
    return predict_dataset(model, [source], out, Options(**options), report)


def test_interrupted_run_resumes(model, tmp_path, local_worker):
    source = as_folder(tmp_path / "images", FILES)
    assert predict(model, source, tmp_path / "complete") == ImageCounts(14, 3)
    assert local_worker.done == [0, 1, 2, 3]
    assert (tmp_path / "complete" / "_SUCCESS").exists()

    def stop(unit):
        if unit == 2:
            raise KeyboardInterrupt

    local_worker.done, local_worker.before, lines = [], stop, []
    out = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        predict(model, source, out, lines)
    assert lines[-1] == "interrupted: 2 of 4 units are finished; run the same command to resume"
    assert not (out / "_SUCCESS").exists()
    local_worker.done, local_worker.before, lines = [], lambda unit: None, []
    assert predict(model, source, out, lines) == ImageCounts(14, 3)
    assert local_worker.done == [2, 3]
    assert lines[0] == "resuming: 2 of 4 units are finished"
    assert read_rows(out) == read_rows(tmp_path / "complete")
    local_worker.done, lines = [], []
    assert predict(model, source, out, lines, unit_size=None) == ImageCounts(14, 3)
    assert local_worker.done == []
    assert lines == [f"{out}: 14 images, 3 unreadable, 4 files; nothing was left to do"]
    (out / "part-000003.parquet").unlink()
    assert predict(model, source, out) == ImageCounts(14, 3)
    assert read_rows(out) == read_rows(tmp_path / "complete")


def test_another_run_in_the_same_folder_is_rejected(model, tmp_path, local_worker):
    source = as_folder(tmp_path / "images", FILES)
    predict(model, source, tmp_path / "out")
    before = read_rows(tmp_path / "out")
    with pytest.raises(UserError, match=r"another run \(--threshold 0.01, now 0.3\)"):
        predict(model, source, tmp_path / "out", threshold=0.3)
    (source / "new.png").write_bytes(FILES[0][1])
    with pytest.raises(UserError, match=r"different source files \(14 files, now 15\)"):
        predict(model, source, tmp_path / "out")
    assert read_rows(tmp_path / "out") == before


def test_failed_units_are_reported_and_retried(model, tmp_path, local_worker, monkeypatch):
    source = as_folder(tmp_path / "images", FILES)
    original = UnitPredictor.predict_unit
    monkeypatch.setattr(
        UnitPredictor, "predict_unit", lambda self, unit: (0, 0, "OSError: gone") if unit == 1 else original(self, unit)
    )
    with pytest.raises(UserError, match=r"1 of 4 units failed, first unit 1: OSError: gone; run the same command"):
        predict(model, source, tmp_path / "out")
    assert len(read_rows(tmp_path / "out")) == 10
    monkeypatch.setattr(UnitPredictor, "predict_unit", lambda self, unit: (0, 0, "OSError: gone"))
    with pytest.raises(UserError, match="stopped after 10 consecutive failed units: OSError: gone"):
        predict(model, source, tmp_path / "other", unit_size=1)
    monkeypatch.setattr(UnitPredictor, "predict_unit", original)
    assert predict(model, source, tmp_path / "out") == ImageCounts(14, 3)


def test_command_line(model, tmp_path, local_worker, capsys):
    source = as_folder(tmp_path / "images", FILES)
    main(["predict-dataset", str(model), str(source), "--out", str(tmp_path / "out"), "--num-cpus", "0.5"])
    assert "14 images, 3 unreadable" in capsys.readouterr().out
    for arguments, message in (
        ([str(tmp_path / "missing"), str(source)], f"{tmp_path}/missing"),
        ([str(model), str(tmp_path / "missing")], f"{tmp_path}/missing: no such file or folder"),
        ([str(model), str(source), "--threshold", "2"], "--threshold 2.0: must be from 0 to 1"),
        ([str(model), str(source), "--num-gpus", "1.5"], "--num-gpus 1.5: must be 0, a fraction"),
        ([str(model), str(source), "--num-cpus", "0"], "--num-cpus 0.0: must be greater than 0"),
        ([str(model), str(source), "--batch-size", "0"], "--batch-size 0: must be 1 or more"),
        ([str(model), str(source), "--object-store-memory", "5"], "Ray needs at least 80 MiB"),
        ([str(model), str(source), "--device", "cuda:1"], "Ray assigns the GPUs"),
        ([str(model), str(source), "--concurrency", "9"], "9 workers with --num-cpus 2 and --num-gpus 0 do not fit"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["predict-dataset", *arguments, "--out", str(tmp_path / "new")])
        error = capsys.readouterr().err.strip()
        assert caught.value.code == 2
        assert error.startswith("error: ")
        assert message in error
        assert "\n" not in error


def test_missing_packages_are_reported(model, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "find_spec", lambda package: None if package == "ray" else True)
    with pytest.raises(UserError, match=re.escape("ray is not installed: pip install 'deformable-detr[dataset]'")):
        predict(model, tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("pool", "cpus", "gpus", "expected"),
    [
        (Options(), 2, 0, WorkerResources(1, 2, 0, "cpu")),
        (Options(), 64, 0, WorkerResources(16, 4, 0, "cpu")),
        (Options(), 16, 4, WorkerResources(4, 1, 1, "cuda")),
        (Options(num_gpus=0.5), 16, 4, WorkerResources(8, 1, 0.5, "cuda")),
        (Options(num_gpus=0.25, num_cpus=3), 8, 1, WorkerResources(2, 3, 0.25, "cuda")),
        (Options(device="cpu"), 16, 4, WorkerResources(4, 4, 0, "cpu")),
        (Options(num_gpus=0), 16, 4, WorkerResources(4, 4, 0, "cpu")),
        (Options(num_cpus=0.5), 2, 0, WorkerResources(4, 0.5, 0, "cpu")),
        (Options(num_cpus=0.1), 0.3, 0, WorkerResources(3, 0.1, 0, "cpu")),
        (Options(concurrency=2), 64, 0, WorkerResources(2, 4, 0, "cpu")),
        (Options(device="mps"), 8, 0, WorkerResources(2, 4, 0, "mps")),
    ],
)
def test_worker_resources_of_a_machine(pool, cpus, gpus, expected):
    assert worker_resources(pool, cpus, gpus, fixed_size=True) == expected


@pytest.mark.parametrize(("device", "packed", "expected"), [
    ("auto", "model.onnx", "auto"), ("auto", "model.safetensors", "cuda"), ("cuda", "model.onnx", "cuda"),
])  # fmt: skip
def test_exported_files_use_the_device_of_their_runtime(tmp_path, monkeypatch, device, packed, expected):
    """A runtime built without CUDA cannot use the machine's GPU."""
    from deformable_detr.predict_dataset.filesystem import OutputFolder
    from deformable_detr.predict_dataset.manifest import create_manifest
    from deformable_detr.predict_dataset.sources import SourceRange

    @contextlib.contextmanager
    def cluster(pool, model_bytes):
        resources = {"CPU": 2.0, "GPU": 1.0}
        yield SimpleNamespace(cluster_resources=lambda: resources, exceptions=SimpleNamespace(RayError=RayError)), True

    jobs, lines = [], []
    monkeypatch.setattr(runs, "_ray_cluster", cluster)
    monkeypatch.setattr(runs, "_unit_results", lambda ray, job, *_: jobs.append(job) or iter(()))
    store = OutputFolder(str(tmp_path))
    settings = Options(format="images", top_k=9, batch_size=1)
    plan = create_manifest(store, "m", ["/set"], iter([SourceRange("/set/a.png", 0, 1, 7)]), settings)
    runs._run_units(store, {packed: b""}, [0], Options(device=device), Progress(plan, {}, lines.append))
    assert jobs[0].device == expected
    assert ("if the file's runtime supports it" in lines[0]) == (expected == "auto")


def test_too_many_workers_are_rejected():
    for pool in (Options(concurrency=3, num_cpus=1), Options(num_gpus=1), Options(device="cuda"), Options(num_cpus=4)):
        with pytest.raises(UserError, match="do not fit this machine's 2 processors and 0 GPUs"):
            worker_resources(pool, 2, 0, fixed_size=True)
        assert worker_resources(pool, 2, 0, fixed_size=False).workers >= 1  # a cluster may scale up


def test_progress(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    lines = []
    plan = Manifest("run", 10, 1000, Options(format="images", top_k=1, batch_size=1, unit_size=100))
    progress = Progress(plan, {0: ImageCounts(100, 1)}, lines.append)
    for unit in range(1, 5):
        now[0] += 5
        progress.add(unit, ImageCounts(100, 2), "")
    assert lines == [
        "300 of 1000 images, 5 unreadable, 20.0 images/s, about 0:00:35 left",
        "500 of 1000 images, 9 unreadable, 20.0 images/s, about 0:00:25 left",
    ]
    unknown_total = Progress(plan.__class__("run", 10, None, plan.options), {}, lines.append)
    now[0] += 10
    unknown_total.add(0, ImageCounts(50, 0), "")
    assert lines[-1] == "50 images, 0 unreadable, 5.0 images/s, about 0:01:30 left"


# --- on Ray


@pytest.fixture(scope="module")
def ray_cluster():
    """One local cluster for the tests that need no separate process."""
    pytest.importorskip("ray")
    from ray import cloudpickle

    this_module = sys.modules[__name__]  # workers cannot import this module
    with runs._ray_cluster(Options(), 2**20):
        cloudpickle.register_pickle_by_value(this_module)
        yield
        cloudpickle.unregister_pickle_by_value(this_module)


@pytest.mark.slow
def test_all_source_formats_on_ray(model, tmp_path, ray_cluster):
    sources = {
        "images": as_folder(tmp_path / "images", FILES),
        "parquet": as_parquet(tmp_path / "set.parquet", FILES),
        "tar": as_tar(tmp_path / "set.tar", FILES),
    }
    results = {}
    for kind, source in sources.items():
        options = {"batch_size": 1, "concurrency": 2, "num_cpus": 0.5}
        assert predict(model, source, tmp_path / "out" / kind, **options) == ImageCounts(len(FILES), len(BAD))
        results[kind] = read_rows(tmp_path / "out" / kind).values()
    values = ("width", "height", "boxes", "scores", "labels", "category_ids", "names")
    for images, parquet, tar in zip(results["images"], results["parquet"], results["tar"], strict=True):
        assert [images[key] for key in values] == [parquet[key] for key in values] == [tar[key] for key in values]


class CrashingPredictor(UnitPredictor):
    """Kill the worker at unit 1 as often as the file `deaths` says."""

    def predict_unit(self, unit):
        deaths = Path(self.out.root) / "deaths"
        remaining = int(deaths.read_text())
        if unit == 1 and remaining:
            deaths.write_text(str(remaining - 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().predict_unit(unit)


@pytest.mark.slow
def test_killed_workers(model, tmp_path, ray_cluster, monkeypatch):
    """After one death the unit is retried; after too many, the other units complete and the unit is reported."""
    source = as_folder(tmp_path / "images", FILES)
    monkeypatch.setattr(runs, "UnitPredictor", CrashingPredictor)
    for deaths, out in ((1, tmp_path / "once"), (MAX_WORKER_DEATHS + 1, tmp_path / "always")):
        out.mkdir()
        (out / "deaths").write_text(str(deaths))
        if deaths == 1:
            assert predict(model, source, out) == ImageCounts(14, 3)
        else:
            with pytest.raises(UserError, match=r"1 of 4 units failed, first unit 1: no worker .* 3 attempts"):
                predict(model, source, out)
            assert len(read_rows(out)) == 10
            assert predict(model, source, out) == ImageCounts(14, 3)  # succeeds after the last death
    assert read_rows(tmp_path / "once") == read_rows(tmp_path / "always")


def start_command(model, source, out):
    """Start the command in a separate process."""
    command = [sys.executable, "-m", "deformable_detr", "predict-dataset", str(model), str(source), "--out", str(out),
               "--threshold", "0.01", "--unit-size", "16", "--num-cpus", "1", "--concurrency", "1"]  # fmt: skip
    # Background shells ignore SIGINT, which child processes would inherit.
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip


def run_and_signal(model, source, out, number, units):
    """Send a signal to the command after some units; return its exit code and output."""
    process = start_command(model, source, out)
    stdout = ""
    while "1 worker on" not in stdout:  # until then a worker of the previous run may still write
        line = process.stdout.readline()
        assert line, process.communicate()
        stdout += line
    existing = len(list(out.glob("part-*.parquet")))
    deadline = time.monotonic() + 1800
    while len(list(out.glob("part-*.parquet"))) < existing + units:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=600)
    return process.returncode, stdout + output


def test_signal_handlers_are_kept():
    """Ray sets one of its own when it starts."""
    before = signal.getsignal(signal.SIGTERM)
    with runs._kept_signal_handlers():
        signal.signal(signal.SIGTERM, lambda *_: None)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_terminated_run_leaves_no_temporary_file(model, tmp_path):
    pytest.importorskip("ray")
    source, out = as_folder(tmp_path / "images", FILES * 20), tmp_path / "out"
    code, stdout = run_and_signal(model, source, out, signal.SIGTERM, 1)
    assert code == 128 + signal.SIGTERM
    assert "units are finished; run the same command to resume" in stdout
    assert not list(out.glob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["playing_cards", "bccd", "coco_mini"])
def test_killed_and_interrupted_on_real_datasets(model, tmp_path, shared, name):
    """With invalid files; killed, resumed, interrupted and resumed, the results equal an uninterrupted run."""
    pytest.importorskip("ray")
    source = tmp_path / "images"
    source.mkdir()
    files = sorted(path for path in (shared / "data" / name).rglob("*") if path.suffix in {".jpg", ".jpeg", ".png"})
    for index, path in enumerate(files):
        shutil.copy(path, source / f"{index:04}{path.suffix}")
    bad = {"0003x.jpg": b"", "0011x.png": b"not an image", "0040x.jpg": files[40].read_bytes()[:2000]}
    for file, data in bad.items():
        (source / file).write_bytes(data)
    (source / "0050x.jpg").symlink_to(tmp_path / "nowhere.jpg")

    out = tmp_path / "out"
    code, _ = run_and_signal(model, source, out, signal.SIGKILL, 2)
    assert code == -signal.SIGKILL
    killed = {path: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    units = json.loads(read_note(out / ".manifest.parquet"))["units"]
    assert 2 <= len(killed) < units
    code, stdout = run_and_signal(model, source, out, signal.SIGINT, 1)
    assert code == 130
    assert re.search(rf"interrupted: \d+ of {units} units are finished; run the same command to resume", stdout)
    process = start_command(model, source, out)
    _, errors = process.communicate(timeout=1800)
    assert process.returncode == 0, errors
    for path, written in killed.items():
        assert path.stat().st_mtime_ns == written  # not rewritten

    process = start_command(model, source, tmp_path / "complete")
    assert process.wait(timeout=1800) == 0
    rows = read_rows(out)
    assert rows == read_rows(tmp_path / "complete")
    assert len(rows) == len(files) + len(bad) + 1
    assert sum(row["error"] is not None for row in rows.values()) == len(bad) + 1
