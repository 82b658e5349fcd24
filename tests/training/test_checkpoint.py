import errno
import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import torch

from deformable_detr.training import checkpoint
from deformable_detr.training.checkpoint import (
    generations,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
    update_state,
)
from deformable_detr.utils.errors import UserError


def tensors(value: float, size: int = 1000):
    return {
        "model": {"weight": torch.full((size,), value)},
        "optimizer": {"weight/exp_avg": torch.full((size,), -value)},
    }


def files_of(*serials):
    return sorted(f"{name}" for n in serials for name in (f"model-{n}.safetensors", f"optimizer-{n}.safetensors",
                                                           f"state-{n}.json"))  # fmt: skip


def test_round_trip_keeps_two_generations(tmp_path):
    for value in (1.0, 2.0, 3.0):
        save_checkpoint(tmp_path / "last", tensors(value), {"step": value, "none": None})
    loaded, state = load_checkpoint(tmp_path / "last")
    assert state == {"step": 3.0, "none": None}
    assert torch.equal(loaded["model"]["weight"], torch.full((1000,), 3.0))
    assert torch.equal(loaded["optimizer"]["weight/exp_avg"], torch.full((1000,), -3.0))
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == files_of(2, 3)
    latest, previous = generations(tmp_path / "last")
    assert (load_checkpoint(latest)[1]["step"], load_checkpoint(previous)[1]["step"]) == (3.0, 2.0)
    assert load_checkpoint(previous)[0]["model"]["weight"][0] == 2
    save_checkpoint(tmp_path / "last", tensors(4.0), {}, keep=1)
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == files_of(4)


def test_tensors_that_share_memory_are_saved(tmp_path):
    shared = torch.arange(4.0)
    save_checkpoint(tmp_path, {"model": {"a": shared, "b": shared, "c": shared[1:]}}, {})
    model = load_checkpoint(tmp_path)[0]["model"]
    assert torch.equal(model["b"], shared)
    assert torch.equal(model["c"], shared[1:])


def test_update_state_keeps_the_tensors(tmp_path):
    save_checkpoint(tmp_path, tensors(1.0), {"step": 1})
    update_state(tmp_path, {"step": 1, "AP": 0.5})
    loaded, state = load_checkpoint(tmp_path)
    assert state == {"step": 1, "AP": 0.5}
    assert loaded["model"]["weight"][0] == 1


@pytest.mark.parametrize("name", ["model-1.safetensors", "optimizer-1.safetensors", "state-1.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped", "empty"])
def test_damaged_file_is_reported_in_one_line(tmp_path, name, damage):
    save_checkpoint(tmp_path, tensors(1.0), {"step": 1})
    path = tmp_path / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        path.write_bytes(b"\xff" + content[1:] if name == "state-1.json" else content[:-9] + b"\xff" + content[-8:])
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    expected = name if (name, damage) != ("state-1.json", "missing") else "there is no checkpoint in"
    with pytest.raises(UserError, match=expected) as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("document", ["[]", "{}", '{"format": "other", "version": 1}', "null"])
def test_foreign_state_file_is_reported(tmp_path, document):
    (tmp_path / "state-1.json").write_text(document)
    with pytest.raises(UserError, match=r"state-1\.json"):
        load_checkpoint(tmp_path)


class Crash(BaseException):
    """Simulates the end of the process."""


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("_write_tensors", 0),
        ("_write_tensors", 1),
        ("checksum", 0),
        ("checksum", 1),
        ("_to_json", 0),
        ("replace_file", 0),
    ],
)
def test_crash_during_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch, function, call):
    save_checkpoint(tmp_path, tensors(1.0), {"step": 1})
    calls, original = [], getattr(checkpoint, function)

    def crash(*arguments):
        calls.append(function)
        if len(calls) > call:
            raise Crash
        return original(*arguments)

    monkeypatch.setattr(checkpoint, function, crash)
    with pytest.raises(Crash):
        save_checkpoint(tmp_path, tensors(2.0), {"step": 2})
    monkeypatch.undo()
    loaded, state = load_checkpoint(tmp_path)
    assert (state["step"], loaded["model"]["weight"][0].item()) == (1, 1.0)
    save_checkpoint(tmp_path, tensors(3.0), {"step": 3})
    assert load_checkpoint(tmp_path)[1] == {"step": 3}
    assert len(list(tmp_path.iterdir())) == 6


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, tensors(1.0), {"step": 1})

    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "replace_file", full)
    with pytest.raises(UserError, match="No space left"):
        save_checkpoint(tmp_path, tensors(2.0), {"step": 2})
    monkeypatch.undo()
    assert load_checkpoint(tmp_path)[1] == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 3


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory):
    """A checkpoint with all parts of a real one, random state included, in files of a few kilobytes."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, tensors(1.5, size=300), {"step": 1, "seconds": 0.1, "random": random_state()})
    assert load_checkpoint(folder)
    return folder


def _assert_detected(small_checkpoint, path, content):
    intact = path.read_bytes()
    path.write_bytes(content)
    try:
        with pytest.raises(UserError) as caught:
            load_checkpoint(small_checkpoint)
    finally:
        path.write_bytes(intact)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_files_are_detected(small_checkpoint):
    generator = random.Random(1)
    files = sorted(small_checkpoint.iterdir())
    for attempt in range(100):
        content = files[attempt % len(files)].read_bytes()
        # Cover the first bytes, the last bytes and random lengths.
        length = (attempt // len(files)) if attempt < 12 else len(content) - attempt if attempt < 24 else None
        length = generator.randrange(len(content)) if length is None else length
        _assert_detected(small_checkpoint, files[attempt % len(files)], content[:length])


def test_flipped_bits_are_detected(small_checkpoint):
    generator = random.Random(2)
    files = sorted(small_checkpoint.iterdir())
    for attempt in range(100):
        path = files[attempt % len(files)]
        content = bytearray(path.read_bytes())
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        _assert_detected(small_checkpoint, path, bytes(content))


def test_every_byte_of_the_state_file_is_verified(tmp_path):
    """Includes the case of checksums, spaces between keys and digits of numbers."""
    save_checkpoint(tmp_path, {"model": {}}, {"step": 1, "loss": 0.25, "text": "ä b"})
    (path,) = generations(tmp_path)
    intact = path.read_bytes()
    for position in range(len(intact)):
        content = bytearray(intact)
        content[position] ^= 0x20 if position % 2 or intact[position : position + 1].isalpha() else 1
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"state-1\.json is"):
            load_checkpoint(path)
    path.write_bytes(intact + b"\n")
    with pytest.raises(UserError, match=r"state-1\.json is damaged"):
        load_checkpoint(path)


def _save_forever(folder, log):
    torch.set_num_threads(1)
    for step in range(1, 10**6):
        value = torch.full((500_000,), float(step))
        save_checkpoint(folder, {"model": {"weight": value}}, {"step": step})
        with open(log, "a") as file:
            file.write(f"{step}\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_sigkill_while_saving_leaves_an_intact_checkpoint(tmp_path):
    generator = random.Random(0)
    for attempt in range(6):
        folder, log = tmp_path / f"{attempt}", tmp_path / f"{attempt}.log"
        process = multiprocessing.get_context("fork").Process(target=_save_forever, args=(folder, log))
        process.start()
        while not log.exists():
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.05))
        process.kill()
        process.join()
        last = int(log.read_text().split()[-1])
        loaded, state = load_checkpoint(folder)
        assert state["step"] in (last, last + 1)
        assert (loaded["model"]["weight"] == state["step"]).all()


def test_random_state_round_trip_through_json():
    torch.manual_seed(3)
    state = json.loads(json.dumps(random_state()))

    def draw():
        return torch.rand(3).tolist()

    first = draw()
    assert draw() != first
    restore_random_state(state)
    assert draw() == first


def test_state_file_is_independent_of_platform_line_ends(tmp_path, monkeypatch):
    """On Windows, text mode writes a line feed as two characters, but the state file is compared byte by byte."""
    original = Path.write_text
    windows = {"newline": "\r\n"}
    monkeypatch.setattr(Path, "write_text", lambda self, text, **rest: original(self, text, **rest | windows))
    (tmp_path / "check").write_text("\n")
    assert (tmp_path / "check").read_bytes() == b"\r\n"  # verifies the patch
    save_checkpoint(tmp_path / "last", tensors(1.0), {"step": 1})
    update_state(tmp_path / "last", {"step": 1, "more": 2})
    assert load_checkpoint(tmp_path / "last")[1] == {"step": 1, "more": 2}
