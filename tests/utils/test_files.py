"""Output files: early path checks and atomic writes."""

import errno
import json
import os
import stat
import subprocess
import sys
import threading

import pytest

from deformable_detr.utils.errors import UserError
from deformable_detr.utils.files import prepare_files, write_files, write_json, write_text


def test_unwritable_path_is_reported_with_its_option(tmp_path):
    (tmp_path / "file").touch()
    long = "a" * 300
    for path, words in (
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "file" / "x.json", "cannot be written: Not a directory"),
        (tmp_path / long, "cannot be written: File name too long"),
        (tmp_path / long / "x.json", "cannot be written: File name too long"),
    ):
        with pytest.raises(UserError) as caught:
            prepare_files({"--json": path})
        assert str(caught.value) == f"--json {path}: {words}"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_options_cannot_write_the_same_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--json writes the same file"):
        prepare_files({"--json": tmp_path / "new" / "a", "--page": None, "--picture": tmp_path / "." / "new" / "a"})
    assert not list(tmp_path.iterdir())
    prepare_files({"--json": tmp_path / "new" / "a", "--picture": tmp_path / "new" / "b"})
    assert [path.name for path in tmp_path.rglob("*")] == ["new"]


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"name": "ä\udc80"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "ä\udc80"}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"name": float("nan")})
    with pytest.raises(UserError, match="cannot be written"):
        write_text(path.parent, "text")
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "ä\udc80"}
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def _contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_files_are_written_together_or_not_at_all(tmp_path, monkeypatch):
    def full(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    old = {"model.safetensors": "1", "config.json": "1", "stale.json": "1"}
    write_files(tmp_path, old)
    with pytest.raises(UserError, match=r"config.json cannot be written: No space left"):
        write_files(tmp_path, {"model.safetensors": "2", "stale.json": None, "config.json": full})
    assert _contents(tmp_path) == old
    new = {"model.safetensors": "2", "config.json": "2", "README.md": "2"}
    for count in range(3):
        write_files(tmp_path, old)
        left = iter(range(count))

        def interrupted(source, target, left=left, replace=os.replace):
            if next(left, None) is None:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                write_files(tmp_path, new | {"stale.json": None})
        assert not (tmp_path / "config.json").exists()
        assert not list(tmp_path.glob(".*"))
    write_files(tmp_path, new | {"stale.json": None})
    assert _contents(tmp_path) == new
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_files(tmp_path, new | {"model.safetensors": "3"})
    assert _contents(tmp_path) == new, "the same config describes the old and the new weights"


def test_symbolic_link_is_kept_and_its_target_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    real, link = tmp_path / "far" / "real.json", tmp_path / "link.json"
    real.write_text("before")
    link.symlink_to(real)
    prepare_files({"--json": link})
    write_json(link, {"a": 1})
    assert link.is_symlink()
    assert json.loads(real.read_text()) == {"a": 1}
    assert [path.name for path in real.parent.iterdir()] == ["real.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_pipe_is_written_to(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    prepare_files({"--json": pipe})
    write_json(pipe, {"a": 1})
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    reader.join(30)
    assert json.loads(read[0]) == {"a": 1}


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="no /dev/stdout here")
@pytest.mark.parametrize("to_file", [False, True])
def test_standard_output_is_written_to(tmp_path, to_file):
    # Use a link, so that a bug cannot replace the machine's /dev/stdout.
    (tmp_path / "out").symlink_to("/proc/self/fd/1" if os.path.exists("/proc/self/fd/1") else "/dev/fd/1")
    path = tmp_path / "out" if not to_file else "/proc/self/fd/1"
    code = (
        "import sys; from pathlib import Path; from deformable_detr.utils.files import prepare_files, write_json\n"
        "print('first', flush=True); prepare_files({'--json': Path(sys.argv[1])}); write_json(Path(sys.argv[1]), 7)"
    )
    command = [sys.executable, "-c", code, str(path)]
    if to_file:
        with open(tmp_path / "file", "w") as file:
            subprocess.run(command, stdout=file, check=True)
        assert (tmp_path / "file").read_text() == "first\n7\n"
    else:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == "first\n7\n"
        assert (tmp_path / "out").is_symlink()
