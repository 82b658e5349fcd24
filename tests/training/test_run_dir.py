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


def test_a_new_folder_is_made(tmp_path):
    RunDir(tmp_path / "a" / "b").claim(resume=False)
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("name", ["config.yaml", "config.json", "model.safetensors", "metrics.jsonl", "checkpoints"])
def test_a_folder_with_a_run_or_model_is_not_written_over(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match=f"{name}.*--resume.*another folder"):
        RunDir(tmp_path).claim(resume=False)
    assert (tmp_path / name).read_text() == "precious"


def test_a_folder_with_other_things_is_used(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunDir(tmp_path).claim(resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"output folder {out}: cannot write there"):
            RunDir(out).claim(resume=False)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no folders from anybody, root included")
def test_an_unwritable_folder_is_named():
    with pytest.raises(UserError, match="/proc/run: cannot write there"):
        RunDir("/proc/run").claim(resume=False)


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        RunDir(tmp_path).claim(resume=True)
    with pytest.raises(UserError, match="nothing to resume"):
        run_config(tmp_path)
    assert not (tmp_path / "missing").exists()


def test_config_goes_out_and_back(tmp_path):
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
def test_restore_refuses_what_is_not_the_run_s(tmp_path, change, data, message):
    folder, config = RunDir(tmp_path), tiny_config()
    save_checkpoint(folder.checkpoints.last, {"model": {}}, state_of(config))
    with pytest.raises(UserError, match=message):
        folder.checkpoints.restore(config.updated({"model": change}), data)


def test_fingerprint_follows_the_annotations_and_not_the_place(tmp_path):
    sets = [open_dataset(write_dataset(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    first, same, other = (dataset.fingerprint for dataset in sets)
    assert first == same
    assert first != other


# --- damaged checkpoints


def run_of(tmp_path, steps=(1, 2, 3), best=2):
    """A run folder with checkpoints of these steps and a best one."""
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


def test_a_whole_run_goes_on_from_its_last_checkpoint_without_a_word(tmp_path, caplog):
    folder, config = run_of(tmp_path)
    tensors, state = folder.checkpoints.restore(config, "same")
    assert (state["train_state"]["step"], tensors["model"]["step"]) == (3, 3)
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["model-3.safetensors", "state-3.json"])
def test_a_damaged_last_checkpoint_is_left_for_the_one_before(tmp_path, caplog, name):
    folder, config = run_of(tmp_path)
    damage(folder.checkpoints.last / name)
    tensors, state = folder.checkpoints.restore(config, "same")
    assert (state["train_state"]["step"], tensors["model"]["step"]) == (2, 2)
    (message,) = caplog.messages
    assert f"{folder.checkpoints.last / name} is damaged" in message
    assert message.endswith(f"resuming from {folder.checkpoints.last / 'state-2.json'}, step 2")
    assert "\n" not in message
    # The damaged one does not push the good one out when the run goes on.
    folder.checkpoints.save({"model": {"step": torch.tensor(2.5)}}, state_of(config, step=3))
    assert [path.name for path in generations(folder.checkpoints.last)] == ["state-4.json", "state-2.json"]
    assert not (folder.checkpoints.last / "damaged-3.json").exists()


def test_the_best_is_the_last_resort(tmp_path, caplog):
    folder, config = run_of(tmp_path, steps=(1, 2, 3, 4))
    damage(folder.checkpoints.last / "model-4.safetensors")
    damage(folder.checkpoints.last / "state-3.json")
    assert folder.checkpoints.restore(config, "same")[1]["train_state"]["step"] == 2
    assert f"resuming from {folder.checkpoints.best / 'state-1.json'}, step 2" in caplog.text


def test_no_good_checkpoint_is_one_line_and_nothing_is_moved(tmp_path):
    folder, config = run_of(tmp_path)
    for path in (tmp_path / "checkpoints").rglob("*.safetensors"):
        damage(path)
    before = sorted(path.name for path in folder.checkpoints.last.iterdir())
    with pytest.raises(UserError, match=r"model-3\.safetensors is damaged.*no other checkpoint in .* is intact"):
        folder.checkpoints.restore(config, "same")
    assert sorted(path.name for path in folder.checkpoints.last.iterdir()) == before


def test_a_run_killed_in_its_first_save_has_nothing_to_restore(tmp_path):
    folder = RunDir(tmp_path)
    folder.checkpoints.last.mkdir(parents=True)
    (folder.checkpoints.last / "model-1.safetensors").write_bytes(b"half")
    assert folder.checkpoints.restore(tiny_config(), "same") is None


# --- one process a folder


def test_two_processes_cannot_write_one_run(tmp_path):
    with RunDir(tmp_path).lock(resume=False):
        with (
            pytest.raises(UserError, match=f"{tmp_path} is being written by another process"),
            RunDir(tmp_path).lock(False),
        ):
            raise AssertionError("both were let in")
        probe = f"import filelock\ntry: filelock.FileLock({str(tmp_path / LOCK)!r}, timeout=0).acquire()\n"
        probe += "except filelock.Timeout: print('locked')"
        said = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
        assert said.stdout == "locked\n"
    assert list(tmp_path.iterdir()) == []
    with RunDir(tmp_path).lock(resume=False):
        pass


def test_the_lock_is_let_go_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), RunDir(tmp_path).lock(resume=False):
        raise ZeroDivisionError
    with RunDir(tmp_path).lock(resume=False):
        pass


def _hold(path):
    with RunDir(path).lock(resume=False):
        if os.fork() == 0:  # as a loader's process, which lives on for seconds after its parent was killed
            time.sleep(60)
            os._exit(0)
        (path / "held").touch()
        time.sleep(60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_the_lock_of_a_killed_process_is_stale_even_if_its_children_live(tmp_path):
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


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, caplog):
    def missing(self):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(filelock.FileLock, "_acquire", missing)
    with RunDir(tmp_path).lock(resume=False):
        pass
    assert f"{tmp_path} cannot be locked" in caplog.text


def test_what_a_killed_process_was_about_to_write_is_deleted(tmp_path):
    (tmp_path / ".model.safetensors.123.tmp").write_text("half")
    (tmp_path / ".metrics.jsonl.123.tmp").write_text("half")
    (tmp_path / ".mine").write_text("")
    with RunDir(tmp_path).lock(resume=False):
        assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, ".mine"]


def test_the_config_of_an_exported_model_appears_last(tmp_path, monkeypatch):
    """So that a folder with config.json has the weights too, whenever the process is killed."""
    placed, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (placed.append(Path(b).name), replace(a, b)))
    RunDir(tmp_path).export(DeformableDETR(tiny_config().model))
    assert placed == ["model.safetensors", "README.md", "config.json"]
