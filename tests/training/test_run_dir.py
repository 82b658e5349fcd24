import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import torch

from deformable_detr.data.dataset import open_dataset
from deformable_detr.detector import DeformableDETR
from deformable_detr.training.checkpoint import generations, save_checkpoint
from deformable_detr.training.run_dir import LOCK, RunDir, run_config
from deformable_detr.utils.errors import UserError
from tests.support.training import tiny_config, write_dataset


def test_new_folder_is_created(tmp_path):
    RunDir(tmp_path / "a" / "b").claim(resume=False)
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("name", ["config.yaml", "config.json", "model.safetensors", "metrics.jsonl", "checkpoints"])
def test_folder_with_a_run_or_model_is_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match=f"{name}.*--resume.*another folder"):
        RunDir(tmp_path).claim(resume=False)
    assert (tmp_path / name).read_text() == "precious"


def test_folder_with_unrelated_files_is_accepted(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunDir(tmp_path).claim(resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_file_at_the_output_path_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"output folder {out}: cannot write there"):
            RunDir(out).claim(resume=False)


@pytest.mark.skipif(sys.platform != "linux", reason="not even root can create folders in /proc")
def test_unwritable_folder_is_reported():
    with pytest.raises(UserError, match="/proc/run: cannot write there"):
        RunDir("/proc/run").claim(resume=False)


def test_resume_without_a_run_is_rejected(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        RunDir(tmp_path).claim(resume=True)
    with pytest.raises(UserError, match="nothing to resume"):
        run_config(tmp_path)
    assert not (tmp_path / "missing").exists()


def test_config_round_trip(tmp_path):
    config = tiny_config(minutes=3.0, epochs=None)
    RunDir(tmp_path).write_config(config)
    assert run_config(tmp_path) == config


def state_of(config, data="same", step=1):
    return {"model": config.model.model_dump(mode="json"), "data": data, "train_state": {"step": step}}


def test_restore(tmp_path):
    folder, config = RunDir(tmp_path), tiny_config()
    assert folder.checkpoints.restore(config, "same") is None
    save_checkpoint(folder.checkpoints.last, {"model": {}}, state_of(config))
    restored = folder.checkpoints.restore(
        config.updated({"train": {"epochs": 9}, "model": {"backbone_weights": "hub"}}), "same"
    )
    assert restored is not None
    assert restored[1] == state_of(config)


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        ({"class_names": ("a", "b", "c")}, "same", "model.class_names is"),
        ({}, "other", "training set has changed"),
        ({"hidden_dim": 64}, "same", "model.hidden_dim is 32 in the run, not 64"),
    ],
)
def test_restore_rejects_another_model_or_dataset(tmp_path, change, data, message):
    folder, config = RunDir(tmp_path), tiny_config()
    save_checkpoint(folder.checkpoints.last, {"model": {}}, state_of(config))
    with pytest.raises(UserError, match=message):
        folder.checkpoints.restore(config.updated({"model": change}), data)


def test_fingerprint_depends_on_annotations_not_on_location(tmp_path):
    datasets = [
        open_dataset(write_dataset(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, same, other = (dataset.fingerprint for dataset in datasets)
    assert first == same
    assert first != other


# --- damaged checkpoints


def write_run(tmp_path, steps=(1, 2, 3), best=2):
    """Write a run folder with checkpoints of these steps and a best one."""
    folder, config = RunDir(tmp_path), tiny_config()
    for step in steps:
        folder.checkpoints.save({"model": {"step": torch.tensor(float(step))}}, state_of(config, step=step))
        if step == best:
            folder.checkpoints.save(
                {"model": {"step": torch.tensor(float(step))}}, state_of(config, step=step), best=True
            )
    return folder, config


def damage(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def test_intact_run_restores_its_last_checkpoint_silently(tmp_path, caplog):
    folder, config = write_run(tmp_path)
    tensors, state = folder.checkpoints.restore(config, "same")
    assert (state["train_state"]["step"], tensors["model"]["step"]) == (3, 3)
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["model-3.safetensors", "state-3.json"])
def test_damaged_last_checkpoint_falls_back_to_the_previous_one(tmp_path, caplog, name):
    folder, config = write_run(tmp_path)
    damage(folder.checkpoints.last / name)
    tensors, state = folder.checkpoints.restore(config, "same")
    assert (state["train_state"]["step"], tensors["model"]["step"]) == (2, 2)
    (message,) = caplog.messages
    assert f"{folder.checkpoints.last / name} is damaged" in message
    assert message.endswith(f"resuming from {folder.checkpoints.last / 'state-2.json'}, step 2")
    assert "\n" not in message
    # The next save must not delete the intact generation.
    folder.checkpoints.save({"model": {"step": torch.tensor(2.5)}}, state_of(config, step=3))
    assert [path.name for path in generations(folder.checkpoints.last)] == ["state-4.json", "state-2.json"]
    assert not (folder.checkpoints.last / "damaged-3.json").exists()


def test_best_checkpoint_is_the_last_fallback(tmp_path, caplog):
    folder, config = write_run(tmp_path, steps=(1, 2, 3, 4))
    damage(folder.checkpoints.last / "model-4.safetensors")
    damage(folder.checkpoints.last / "state-3.json")
    assert folder.checkpoints.restore(config, "same")[1]["train_state"]["step"] == 2
    assert f"resuming from {folder.checkpoints.best / 'state-1.json'}, step 2" in caplog.text


def test_no_intact_checkpoint_is_reported_and_no_file_moved(tmp_path):
    folder, config = write_run(tmp_path)
    for path in (tmp_path / "checkpoints").rglob("*.safetensors"):
        damage(path)
    before = sorted(path.name for path in folder.checkpoints.last.iterdir())
    with pytest.raises(UserError, match=r"model-3\.safetensors is damaged.*no other checkpoint in .* is intact"):
        folder.checkpoints.restore(config, "same")
    assert sorted(path.name for path in folder.checkpoints.last.iterdir()) == before


def test_run_killed_in_its_first_save_has_no_checkpoint(tmp_path):
    folder = RunDir(tmp_path)
    folder.checkpoints.last.mkdir(parents=True)
    (folder.checkpoints.last / "model-1.safetensors").write_bytes(b"half")
    assert folder.checkpoints.restore(tiny_config(), "same") is None


# --- one process per folder


def test_run_folder_is_locked(tmp_path):
    with RunDir(tmp_path).lock(resume=False):
        with (
            pytest.raises(UserError, match=f"{tmp_path} is being written by another process"),
            RunDir(tmp_path).lock(False),
        ):
            raise AssertionError("both acquired the lock")
        probe = f"import filelock\ntry: filelock.FileLock({str(tmp_path / LOCK)!r}, timeout=0).acquire()\n"
        probe += "except filelock.Timeout: print('locked')"
        process = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
        assert process.stdout == "locked\n"
    assert list(tmp_path.iterdir()) == []
    with RunDir(tmp_path).lock(resume=False):
        pass


def test_lock_is_released_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), RunDir(tmp_path).lock(resume=False):
        raise ZeroDivisionError
    with RunDir(tmp_path).lock(resume=False):
        pass


def _hold(path):
    with RunDir(path).lock(resume=False):
        if os.fork() == 0:  # like a loader process, which outlives its killed parent for seconds
            time.sleep(60)
            os._exit(0)
        (path / "held").touch()
        time.sleep(60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_lock_of_a_killed_process_is_stale_while_its_children_live(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path,))
    process.start()
    try:
        while not (tmp_path / "held").exists():
            assert process.is_alive()
            time.sleep(0.01)
        with pytest.raises(UserError, match="another process"), RunDir(tmp_path).lock(False):
            pass
    finally:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        orphans = children.read_text().split() if children.exists() else []
        process.kill()
        process.join()
    try:
        assert (tmp_path / LOCK).exists()
        with RunDir(tmp_path).lock(resume=False):
            pass
    finally:
        for number in orphans:
            os.kill(int(number), 9)


def test_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(self):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(filelock.FileLock, "_acquire", unsupported)
    with RunDir(tmp_path).lock(resume=False):
        pass
    assert f"{tmp_path} cannot be locked" in caplog.text


def test_temporary_files_of_a_killed_process_are_deleted(tmp_path):
    (tmp_path / ".model.safetensors.123.tmp").write_text("half")
    (tmp_path / ".metrics.jsonl.123.tmp").write_text("half")
    (tmp_path / ".mine").write_text("")
    with RunDir(tmp_path).lock(resume=False):
        assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, ".mine"]


def test_export_writes_the_config_last(tmp_path, monkeypatch):
    """A folder with config.json then has the weights too, whenever the process is killed."""
    names, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (names.append(Path(b).name), replace(a, b)))
    RunDir(tmp_path).export(DeformableDETR(tiny_config().model))
    assert names == ["model.safetensors", "README.md", "config.json"]
