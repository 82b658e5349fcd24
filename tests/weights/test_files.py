"""Weight files, wrapped, split, damaged or malicious: each loads equal or fails with one clear line; none runs code."""

import argparse
import builtins
import errno
import io
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file

from deformable_detr import DeformableDETR
from tests.support.special_files import needs_pipes, replace_by_device, replace_by_pipe, time_limit
from tests.support.weights import (
    edit_json,
    equal_weights,
    load_error,
    official_values,
    read_tensors,
    tiny_transformers_model,
    write_tensors,
)

EQUAL = None
LARGER_THAN_ITS_DATA = torch.zeros(1).expand(10**6, 10**6)


def write_pickle(folder, values, name="pytorch_model.bin"):
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(values, folder / name)


def rename_tensors(folder, function):
    write_tensors(folder, {function(name): value for name, value in read_tensors(folder).items()})


def edit_header(folder, change):
    """Replace the header of the safetensors file but not its data."""
    content = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def edit_tensor_headers(folder, **changes):
    edit_header(folder, lambda h: {n: {**v, **changes} if "dtype" in v else v for n, v in h.items()})


def write_shards(folder, names=("a.safetensors", "b.safetensors"), **changes):
    tensors = read_tensors(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, name in enumerate(names):
        part = dict(list(tensors.items())[i :: len(names)])
        save_file(part, folder / name) if name.endswith("safetensors") else torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index_name = "model.safetensors" if names[0].endswith("safetensors") else "pytorch_model.bin"
    (folder / f"{index_name}.index.json").write_text(json.dumps({"weight_map": {**weight_map, **changes}}))


def write_index(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)


CHANGES = {
    # Valid variants.
    "shards": (write_shards, EQUAL),
    "unlisted shard": (lambda f: (write_shards(f), save_file({"x": torch.zeros(1)}, f / "model-9.safetensors")), EQUAL),
    "pickled weights": (lambda f: write_pickle(f, read_tensors(f)), EQUAL),
    "pickled shards": (lambda f: write_shards(f, ("a.bin", "b.bin")), EQUAL),
    "ordered dict": (lambda f: write_pickle(f, OrderedDict(read_tensors(f))), EQUAL),
    "DistributedDataParallel prefix": (lambda f: rename_tensors(f, lambda n: f"module.{n}"), EQUAL),
    "Lightning prefix": (lambda f: rename_tensors(f, lambda n: f"model.{n}"), EQUAL),
    "two prefixes": (lambda f: rename_tensors(f, lambda n: f"module._orig_mod.{n}"), EQUAL),
    "Lightning checkpoint": (
        lambda f: write_pickle(f, {"epoch": 3, "state_dict": {f"model.{n}": v for n, v in read_tensors(f).items()}}),
        EQUAL,
    ),
    "EMA weights": (lambda f: write_pickle(f, {"ema": {"module": read_tensors(f), "updates": 7}}), EQUAL),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged"),
    "Git LFS pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "damaged",
    ),
    "pickle named safetensors": (lambda f: torch.save({"a": torch.zeros(1)}, f / "model.safetensors"), "damaged"),
    "header longer than the file": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        "damaged",
    ),
    "header is a list": (lambda f: edit_header(f, lambda h: []), "damaged"),
    "unknown dtype": (lambda f: edit_tensor_headers(f, dtype="F1"), "damaged"),
    "overlapping data": (lambda f: edit_tensor_headers(f, data_offsets=[0, 4]), "damaged"),
    "huge shapes": (lambda f: edit_tensor_headers(f, shape=[2**62, 9]), "damaged"),
    "missing shard": (lambda f: write_shards(f, extra="c.safetensors"), "c.safetensors: no such file"),
    "shard in another folder": (lambda f: write_shards(f, extra="../ours/model.safetensors"), "not a file in the same"),
    "absolute shard path": (lambda f: write_shards(f, extra="/etc/passwd"), "not a file in the same"),
    "very long shard name": (lambda f: write_shards(f, extra="x" * 5000), "no such file"),
    "tensor in no shard": (lambda f: write_shards(f, extra="a.safetensors"), EQUAL),
    "index is a list": (lambda f: write_index(f, "[]"), "not hold a JSON object"),
    "index without weight_map": (lambda f: write_index(f, '{"metadata": {}}'), "no weight_map"),
    "truncated shard": (
        lambda f: (write_shards(f), os.truncate(f / "b.safetensors", 10000)),
        "b.safetensors is damaged",
    ),
    "list": (lambda f: write_pickle(f, [torch.zeros(1)]), "no dict of tensors"),
    "numbers": (lambda f: write_pickle(f, {"a": 1}), "'a' is not a tensor"),
    "numbered tensors": (lambda f: write_pickle(f, {0: torch.zeros(1)}), "'0' is not a tensor"),
    "sparse tensor": (lambda f: write_pickle(f, {"a": torch.eye(3).to_sparse()}), "a is not a dense tensor"),
    "meta tensor": (lambda f: write_pickle(f, {"a": torch.zeros(3, device="meta")}), "a is not a dense tensor"),
    "tensor larger than its data": (lambda f: write_pickle(f, {"a": LARGER_THAN_ITS_DATA}), "less data"),
    "recursive dict": (lambda f: write_pickle(f, (lambda d: d.update(model=d) or d)({})), "not a tensor"),
    "settings outside official checkpoints": (
        lambda f: write_pickle(f, {"args": argparse.Namespace(a=1)}),
        r"refused.*argparse\.Namespace",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_repository_loads_equal_or_fails_in_one_line(name, shared_repo, repo):
    change, message = CHANGES[name]
    change(repo)
    if message is EQUAL:
        assert equal_weights(DeformableDETR.from_pretrained(shared_repo), DeformableDETR.from_pretrained(repo))
        return
    error = load_error(repo)
    assert re.search(message, error), error
    assert str(repo) in error


def test_shards_written_by_transformers(shared_repo, tmp_path):
    tiny_transformers_model().save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert equal_weights(DeformableDETR.from_pretrained(shared_repo), DeformableDETR.from_pretrained(tmp_path))


def test_damaged_files_are_reported(shared_checkpoint, repo, tmp_path, tiny_backbone):
    checkpoint = shutil.copy(shared_checkpoint, tmp_path / "new.pth")
    torch.save(official_values(checkpoint), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "pickled").mkdir()
    torch.save(load_file(repo / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    shutil.copy(repo / "config.json", tmp_path / "pickled")
    for file, source in (
        (checkpoint, checkpoint),
        (tmp_path / "old.pth", tmp_path / "old.pth"),
        (repo / "model.safetensors", repo),
        (tmp_path / "pickled" / "pytorch_model.bin", tmp_path / "pickled"),
    ):
        content = file.read_bytes()
        for damaged in (
            content[:1], content[:100], content[: len(content) // 2], content[:-1], content[:-40], b"\x00" * 1000,
            b"<html>not found</html>", pickle.dumps({"model": 3}), pickle.dumps([1]),
            content[:40] + bytes(255 - byte for byte in content[40:400]) + content[400:],
        ):  # fmt: skip
            file.write_bytes(damaged)
            assert str(file) in load_error(source)
        file.write_bytes(content)
        DeformableDETR.from_pretrained(source)


def test_unreadable_file_is_not_reported_as_damaged(repo, shared_checkpoint, monkeypatch):
    for source, file in [(repo, repo / "model.safetensors"), (shared_checkpoint, shared_checkpoint)]:
        opened = os.open

        def denied(path, *arguments, file=file, opened=opened):
            if os.fspath(path) == os.fspath(file):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return opened(path, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", denied)  # root can read every file
            assert f"{file} cannot be read: permission denied" in load_error(source)


@needs_pipes
@pytest.mark.parametrize("replace", [replace_by_pipe, replace_by_device])
def test_special_files_are_refused(repo, shared_checkpoint, tmp_path, tiny_backbone, replace):
    """They would block, or never end."""
    copies = [shutil.copytree(repo, tmp_path / str(number)) for number in range(4)]
    write_shards(copies[2])
    write_pickle(copies[3], read_tensors(copies[3]))
    checkpoint = shutil.copy(shared_checkpoint, tmp_path / "new.pth")
    for source, name in [
        (copies[0], "config.json"), (copies[1], "model.safetensors"), (copies[2], "b.safetensors"),
        (copies[3], "pytorch_model.bin"), (checkpoint, ""),
    ]:  # fmt: skip
        DeformableDETR.from_pretrained(source)
        replace(source / name if name else source)
        with time_limit():
            assert re.search("not a regular file|has no |no such folder or file", load_error(source)), name


# --- malicious files --------------------------------------------------------------------------------------------------


class Call:
    """An object that unpickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def namespace_with_state(mark):
    """Return a harmless class whose state is a call."""
    namespace = argparse.Namespace()
    namespace.__dict__["x"] = Call(os.system, f"touch {mark}")
    return namespace


def nested_namespace(mark):
    payload = Call(builtins.exec, f"open({mark!r}, 'w')")
    return {"model": {}, "args": argparse.Namespace(a=argparse.Namespace(b=[{"c": payload}]))}


PAYLOADS = {
    "os.system": lambda mark: Call(os.system, f"touch {mark}"),
    "eval": lambda mark: Call(builtins.eval, f"open({mark!r}, 'w')"),
    "open": lambda mark: Call(builtins.open, mark, "w"),
    "nested Namespace": nested_namespace,
    "Namespace state": namespace_with_state,
    "getattr": lambda mark: Call(builtins.getattr, Call(builtins.__import__, "os"), "system"),
    "torch.load": lambda mark: Call(torch.load, mark),
    "pickle.loads": lambda mark: {"model": {"transformer.level_embed": Call(pickle.loads, b"N.")}},
}
EXECUTABLE = list(PAYLOADS)[:5]


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", PAYLOADS)
def test_pickles_do_not_run_code(name, protocol, tmp_path):
    mark = tmp_path / "mark"
    values = PAYLOADS[name](str(mark))
    for path, zipped in ((tmp_path / "new.pth", True), (tmp_path / "old.pth", False)):
        torch.save(values, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(values, protocol=protocol))
    for path in sorted(tmp_path.glob("*.pth")):
        assert "refused" in load_error(path) or "damaged" in load_error(path)
    assert not mark.exists()
    if name in EXECUTABLE:  # control: unpickling runs it
        pickle.loads((tmp_path / "bare.pth").read_bytes())
        assert mark.exists()


@pytest.mark.parametrize("sharded", [False, True])
def test_pickles_of_a_repository_do_not_run_code(sharded, repo, tmp_path):
    name = "part.bin" if sharded else "pytorch_model.bin"
    write_pickle(repo, {"model.level_embed": Call(os.system, f"touch {tmp_path / 'mark'}")}, name)
    if sharded:
        index_name = {"weight_map": {"model.level_embed": name}}
        (repo / "pytorch_model.bin.index.json").write_text(json.dumps(index_name))
    error = load_error(repo)
    assert f"{repo / name} is refused" in error
    assert "system" in error
    assert not (tmp_path / "mark").exists()


def write_zip(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def test_archives_that_are_not_checkpoints_are_rejected(shared_checkpoint, tmp_path):
    data_pickle = pickle.dumps({"model": {}}, protocol=2)
    write_zip(tmp_path / "traversal.pth", {"../../escaped": b"x", "a/data.pkl": data_pickle})
    write_zip(tmp_path / "bomb.pth", {"a/data.pkl": data_pickle, "a/data/0": bytes(10**8)}, zipfile.ZIP_DEFLATED)
    write_zip(tmp_path / "empty.pth", {})
    write_zip(
        tmp_path / "script.pth", {"a/data.pkl": data_pickle, "a/constants.pkl": data_pickle, "a/code/x.py": b"1/0"}
    )
    with tarfile.open(tmp_path / "tar.pth", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            content = pickle.dumps(Call(os.system, f"touch {tmp_path / 'mark'}"))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    content = shared_checkpoint.read_bytes()
    (tmp_path / "doubled.pth").write_bytes(content[:1000] + content)
    for path in sorted(tmp_path.glob("*.pth")):
        error = load_error(path)
        assert any(word in error for word in ("damaged", "refused", "no dict"))
        assert str(path) in error
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path.parent / "escaped").exists()
    assert "more than its own size" in load_error(tmp_path / "bomb.pth")


def test_command_line_errors_are_one_line_with_exit_code_2(repo, tmp_path, capsys):
    from PIL import Image

    from deformable_detr import cli

    edit_json(repo / "config.json", encoder_layers=7)
    torch.save(Call(os.system, "true"), tmp_path / "evil.pth")
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    image = str(tmp_path / "image.png")
    for model in (repo, tmp_path / "evil.pth", tmp_path / "gone"):
        for command in (
            ["predict", str(model), image],
            ["evaluate", str(model), str(tmp_path)],
            ["explain", str(model), image],
            ["export", str(model), "--to", "onnx", "--out", str(tmp_path / "m.onnx")],
            ["convert", str(model), "--to", "native", "--out", str(tmp_path / "out")],
            ["train", str(tmp_path), "--weights", str(model), "--out", str(tmp_path / "run")],
        ):
            with pytest.raises(SystemExit) as raised:
                cli.main(command)
            assert raised.value.code == 2, command
            [line] = capsys.readouterr().err.strip().splitlines()
            assert line.startswith("error: "), command
