"""Files that a command writes: what cannot work is named before long work, what is written is whole."""

import json

import pytest

from deformable_detr.errors import UserError
from deformable_detr.outputs import prepare_file, prepare_files, write_json, write_text


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
