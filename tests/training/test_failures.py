"""Machine failures during training: a one-line error with a hint, exit code 2, and an intact last checkpoint."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import torch

from deformable_detr.cli import main
from deformable_detr.detector import DeformableDETR
from deformable_detr.evaluation import evaluator
from deformable_detr.training import checkpoint
from deformable_detr.training.checkpoint import load_checkpoint
from deformable_detr.training.logger import TrainingLogger
from deformable_detr.training.run_dir import RunDir, run_config
from deformable_detr.training.setup import explain_errors
from deformable_detr.training.step import TrainStep
from deformable_detr.training.trainer import train_model
from deformable_detr.utils.errors import UserError
from deformable_detr.weights import native
from tests.support.training import tiny_config, write_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("set"))


def explained(error, tmp_path, workers=2):
    """Return the message that replaces this error."""
    config = tiny_config(batch_size=4).updated({"data": {"workers": workers}})
    with pytest.raises(UserError) as caught, explain_errors(RunDir(tmp_path), config):
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error
    return str(caught.value)


CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.2 GiB is free."
    "\nIncluding non-PyTorch memory, this process has 14.50 GiB memory in use."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
WORKER = "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError(CUDA),
            ["the device is out of memory (tried to allocate 2.00 GiB)", "--batch-size (now 4", "--total-batch-size",
             "--image-size (now 64)", "gradient_checkpointing"],
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), ["device is out of memory", "--batch-size"]),
        (RuntimeError(CPU), ["this machine is out of memory", "--batch-size", "--workers"]),
        (MemoryError(), ["this machine is out of memory", "--batch-size", "--workers"]),
        (MemoryError(WORKER + "MemoryError"), ["this machine is out of memory"]),
        (
            RuntimeError("DataLoader worker (pid 71) is killed by signal: Killed. "),
            ["was killed (SIGKILL)", "--workers (now 2; 0 loads in the main process)", "--batch-size (now 4)"],
        ),
        (
            RuntimeError("DataLoader worker (pid 71) is killed by signal: Segmentation fault. Details are lost."),
            ["crashed (Segmentation fault): use --workers 0"],
        ),
        (RuntimeError("DataLoader worker (pid(s) 71, 72) exited unexpectedly"), ["ended unexpectedly", "(now 2)"]),
        (
            RuntimeError(
                "DataLoader worker (pid 71) is killed by signal: Bus error. It is possible that dataloader's workers "
                "are out of shared memory. Please try to raise your shared memory limit."
            ),
            ["/dev/shm", "--workers", "--shm-size"],
        ),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a/x"), ["runs/a/x: No space left", "free some disk"]),
        (OSError(errno.EMFILE, "Too many open files"), ["Too many open files", "--workers", "ulimit"]),
        (
            OSError(WORKER + "OSError: [Errno 24] Too many open files"), ["files, in a data loader process", "ulimit"]
        ),
        (PermissionError(errno.EACCES, "Permission denied", "runs/a"), ["runs/a: Permission denied"]),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, Exception) else "",
)  # fmt: skip
def test_machine_errors_are_explained(tmp_path, error, words):
    line = explained(error, tmp_path)
    assert all(word in line for word in words), line
    assert line.endswith("no checkpoint was saved: start again")
    RunDir(tmp_path).write_config(tiny_config())
    assert explained(error, tmp_path).endswith("no checkpoint was saved: start again with --resume")


def test_error_mentions_the_last_checkpoint(tmp_path):
    RunDir(tmp_path).checkpoints.save({"model": {}}, {})
    assert explained(MemoryError(), tmp_path).endswith("resume from the last checkpoint with --resume")


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("x"), OSError()]
)
def test_program_errors_are_not_changed(tmp_path, error):
    with pytest.raises(type(error)) as caught, explain_errors(RunDir(tmp_path), tiny_config()):
        raise error
    assert caught.value is error


# --- during training


def assert_intact_after_epoch_1(out):
    """Assert that the checkpoint and the model of the first epoch load."""
    tensors, state = load_checkpoint(out / "checkpoints" / "last")
    assert state["train_state"]["epoch"] == 1
    assert all(value.isfinite().all() for value in tensors["model"].values())
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
    DeformableDETR.from_pretrained(out)


def fail_in_epoch_2(monkeypatch, fail):
    original = TrainStep.step

    def step(self, batch, global_step, *rest, **options):
        if global_step == 2:
            fail()
        return original(self, batch, global_step, *rest, **options)

    monkeypatch.setattr(TrainStep, "step", step)


def raiser(error):
    def work(*_, **__):
        raise error

    return work


def test_device_out_of_memory(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        fail_in_epoch_2(patched, raiser(torch.OutOfMemoryError(CUDA)))
        with pytest.raises(UserError, match=r"the device is out of memory.*resume from the last checkpoint"):
            train_model(data, tmp_path / "run", tiny_config())
    assert_intact_after_epoch_1(tmp_path / "run")
    assert train_model(data, tmp_path / "run", run_config(tmp_path / "run"), resume=True)["step"] == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_loader_process(data, tmp_path, monkeypatch):
    import multiprocessing

    def kill():
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)
            process.join()

    out = tmp_path / "run"
    config = tiny_config().updated({"data": {"workers": 1}})
    with monkeypatch.context() as patched:
        fail_in_epoch_2(patched, kill)
        with pytest.raises(UserError, match=r"loader process was killed.*--workers \(now 1.*the last checkpoint"):
            train_model(data, out, config)
    assert_intact_after_epoch_1(out)
    assert train_model(data, out, run_config(out), resume=True)["step"] == 4


FAILING_RUN = """
import sys
from deformable_detr.cli import main
from deformable_detr.training.step import TrainStep

def fail(*_, **__):
    raise ValueError("selected index k out of range")

TrainStep.step = fail
main(sys.argv[1:])
"""


def test_error_in_a_step_ends_the_process(data, tmp_path):
    (tmp_path / "config.yaml").write_text(tiny_config().updated({"data": {"workers": 1}}).to_yaml())
    words = ["train", str(data), "--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]
    with subprocess.Popen([sys.executable, "-c", FAILING_RUN, *words], stderr=subprocess.PIPE, text=True) as process:
        output = ""
        while "out of range" not in output:  # printed before the workers end
            output += process.stderr.readline() or pytest.fail(f"another end: {output}")
        try:
            assert process.wait(timeout=30) == 1  # with waiting for the worker's minute: 60 s
        finally:
            process.kill()


@pytest.mark.parametrize("target", ["checkpoint", "metrics", "model"])
def test_full_disk(data, tmp_path, monkeypatch, capsys, target):
    """Simulates the error of the operating system from the second epoch on."""
    out, full = tmp_path / "run", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill():
        owner, name, error = {
            "checkpoint": (checkpoint, "_sync_folder", full),
            "metrics": (TrainingLogger, "write", full),
            "model": (native, "write_files", UserError("model.safetensors cannot be written: No space left on device")),
        }[target]
        monkeypatch.setattr(owner, name, raiser(error))

    with monkeypatch.context() as patched:
        fail_in_epoch_2(patched, fill)
        if target == "model":  # a better AP, so that the model is written
            figures = iter([0.1, 0.2])
            patched.setattr(evaluator, "evaluate_distributed", lambda *_, **__: {"AP": next(figures), "AP50": 0.6})
        with pytest.raises(UserError, match=r"No space left on device.*with --resume") as caught:
            train_model(data, out, tiny_config())
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if target == "model":
        assert load_checkpoint(out / "checkpoints" / "last")[1]["train_state"]["epoch"] == 2
        DeformableDETR.from_pretrained(out)
    else:
        assert_intact_after_epoch_1(out)
    assert train_model(data, out, run_config(out), resume=True)["step"] == 4


# --- a real full disk


def disk_usage(folder):
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def mount_disk(tmp_path):
    """Return a function that mounts tmp_path/disk as a tmpfs of some size, or resizes it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root on Linux")

    def mount(size):
        options = f"{'remount,' if disk.is_mount() else ''}size={size}"
        process = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True, text=True
        )
        if process.returncode:
            pytest.skip(f"no tmpfs can be mounted: {process.stderr.strip()}")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", "-l", str(disk)], check=True)  # lazy: weights may still be mapped


@pytest.mark.parametrize("part", [0.02, 0.5, 0.95])
def test_disk_fills_up_during_a_save(data, tmp_path, mount_disk, capsys, part):
    """The disk holds the first epoch and `part` of the next checkpoint."""
    (tmp_path / "config.yaml").write_text(tiny_config(epochs=1).to_yaml())
    command = ["train", str(data), "--config", str(tmp_path / "config.yaml"), "--out"]
    main([*command, str(tmp_path / "measured")])
    generation = disk_usage(tmp_path / "measured/checkpoints/last")
    disk = mount_disk(disk_usage(tmp_path / "measured") + int(part * generation))
    main([*command, str(disk / "run")])
    before = {path: path.read_bytes() for path in (disk / "run").rglob("*.safetensors")}
    capsys.readouterr()

    with pytest.raises(SystemExit) as caught:
        main(["train", str(data), "--out", str(disk / "run"), "--epochs", "2", "--resume"])
    err = capsys.readouterr().err
    assert caught.value.code == 2
    assert "Traceback" not in err
    assert "No space left on device" in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: checkpoint ")
    assert before == {path: path.read_bytes() for path in (disk / "run").rglob("*.safetensors")}
    assert_intact_after_epoch_1(disk / "run")

    mount_disk(10 * disk_usage(tmp_path / "measured"))
    main(["train", str(data), "--out", str(disk / "run"), "--epochs", "2", "--resume"])
    assert load_checkpoint(disk / "run/checkpoints/last")[1]["train_state"]["step"] == 4
