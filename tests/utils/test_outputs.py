"""Files that a command writes: what cannot work is named before long work, what is written is whole."""

import json
import os
import stat
import subprocess
import sys
import threading

import pytest

from deformable_detr.utils.errors import UserError
from deformable_detr.utils.files import prepare_file, prepare_files, write_json, write_text


def test_what_cannot_be_written_is_named_with_its_option(tmp_path):
    (tmp_path / "file").touch()
    long = "a" * 300
    for path, words in (
        (tmp_path, "is a folder, name a file"),
        (tmp_path / "file" / "x.json", "cannot be written: Not a directory"),
        (tmp_path / long, "cannot be written: File name too long"),
        (tmp_path / long / "x.json", "cannot be written: File name too long"),
    ):
        with pytest.raises(UserError) as caught:
            prepare_file(path, "--json")
        assert str(caught.value) == f"--json {path}: {words}"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_options_do_not_write_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--json goes there too"):
        prepare_files({"--json": tmp_path / "new" / "a", "--page": None, "--picture": tmp_path / "." / "new" / "a"})
    assert not list(tmp_path.iterdir())
    prepare_files({"--json": tmp_path / "new" / "a", "--picture": tmp_path / "new" / "b"})
    assert [path.name for path in tmp_path.rglob("*")] == ["new"]


def test_what_is_there_stays_until_all_is_written(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"name": "ä\udc80"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "ä\udc80"}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"name": float("nan")})
    with pytest.raises(UserError, match="cannot be written"):
        write_text(path.parent, "text")
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "ä\udc80"}
    assert [one.name for one in path.parent.iterdir()] == ["a.json"]


def test_the_file_of_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "far").mkdir()
    real, link = tmp_path / "far" / "real.json", tmp_path / "link.json"
    real.write_text("before")
    link.symlink_to(real)
    prepare_file(link, "--json")
    write_json(link, {"a": 1})
    assert link.is_symlink()
    assert json.loads(real.read_text()) == {"a": 1}
    assert [path.name for path in real.parent.iterdir()] == ["real.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_written_to_and_stays(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    prepare_file(pipe, "--json")
    write_json(pipe, {"a": 1})
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    reader.join(30)
    assert json.loads(read[0]) == {"a": 1}


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="no /dev/stdout here")
@pytest.mark.parametrize("to_file", [False, True])
def test_standard_output_is_a_place_for_json(tmp_path, to_file):
    # A link of its own to the same place: a mistake here shall not cost the machine its /dev/stdout.
    (tmp_path / "out").symlink_to("/proc/self/fd/1" if os.path.exists("/proc/self/fd/1") else "/dev/fd/1")
    place = tmp_path / "out" if not to_file else "/proc/self/fd/1"
    code = (
        "import sys; from pathlib import Path; from deformable_detr.utils.outputs import prepare_file, write_json\n"
        "print('first', flush=True); prepare_file(Path(sys.argv[1]), '--json'); write_json(Path(sys.argv[1]), 7)"
    )
    command = [sys.executable, "-c", code, str(place)]
    if to_file:
        with open(tmp_path / "file", "w") as file:
            subprocess.run(command, stdout=file, check=True)
        assert (tmp_path / "file").read_text() == "first\n7\n"
    else:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == "first\n7\n"
        assert (tmp_path / "out").is_symlink()
