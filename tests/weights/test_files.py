"""Files of tensors: wrapped, split, damaged or malicious. Each loads equal or gives one clear line; none runs code."""

import argparse
import builtins
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


def pickled(folder, values, name="pytorch_model.bin"):
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(values, folder / name)


def rename(folder, function):
    write_tensors(folder, {function(name): value for name, value in read_tensors(folder).items()})


def edit_header(folder, change):
    """Replace the header of the safetensors file, but not its data."""
    content = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def edit_tensor_headers(folder, **changes):
    edit_header(folder, lambda h: {n: {**v, **changes} if "dtype" in v else v for n, v in h.items()})


def shards(folder, names=("a.safetensors", "b.safetensors"), **changes):
    tensors = read_tensors(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, name in enumerate(names):
        part = dict(list(tensors.items())[i :: len(names)])
        save_file(part, folder / name) if name.endswith("safetensors") else torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = "model.safetensors" if names[0].endswith("safetensors") else "pytorch_model.bin"
    (folder / f"{index}.index.json").write_text(json.dumps({"weight_map": {**weight_map, **changes}}))


def write_index(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)


CHANGES = {
    # Loads, because nothing is lost.
    "shards": (shards, EQUAL),
    "an unlisted shard": (lambda f: (shards(f), save_file({"x": torch.zeros(1)}, f / "model-9.safetensors")), EQUAL),
    "pickled weights": (lambda f: pickled(f, read_tensors(f)), EQUAL),
    "pickled shards": (lambda f: shards(f, ("a.bin", "b.bin")), EQUAL),
    "ordered dict": (lambda f: pickled(f, OrderedDict(read_tensors(f))), EQUAL),
    "prefix of DistributedDataParallel": (lambda f: rename(f, lambda n: f"module.{n}"), EQUAL),
    "prefix of Lightning": (lambda f: rename(f, lambda n: f"model.{n}"), EQUAL),
    "two prefixes": (lambda f: rename(f, lambda n: f"module._orig_mod.{n}"), EQUAL),
    "Lightning checkpoint": (
        lambda f: pickled(f, {"epoch": 3, "state_dict": {f"model.{n}": v for n, v in read_tensors(f).items()}}),
        EQUAL,
    ),
    "averaged weights": (lambda f: pickled(f, {"ema": {"module": read_tensors(f), "updates": 7}}), EQUAL),
    # Weights.
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged"),
    "a pointer of git": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "damaged",
    ),
    "a pickle named safetensors": (lambda f: torch.save({"a": torch.zeros(1)}, f / "model.safetensors"), "damaged"),
    "header longer than the file": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        "damaged",
    ),
    "header is a list": (lambda f: edit_header(f, lambda h: []), "damaged"),
    "unknown dtype": (lambda f: edit_tensor_headers(f, dtype="F1"), "damaged"),
    "overlapping data": (lambda f: edit_tensor_headers(f, data_offsets=[0, 4]), "damaged"),
    "endless shapes": (lambda f: edit_tensor_headers(f, shape=[2**62, 9]), "damaged"),
    # Indices.
    "a shard is missing": (lambda f: shards(f, extra="c.safetensors"), "c.safetensors: no such file"),
    "a shard in another folder": (lambda f: shards(f, extra="../ours/model.safetensors"), "not a file in the same"),
    "a shard at the root": (lambda f: shards(f, extra="/etc/passwd"), "not a file in the same"),
    "a shard of an endless name": (lambda f: shards(f, extra="x" * 5000), "no such file"),
    "a tensor in no shard": (lambda f: shards(f, extra="a.safetensors"), EQUAL),
    "index is a list": (lambda f: write_index(f, "[]"), "not hold a JSON object"),
    "index without a map": (lambda f: write_index(f, '{"metadata": {}}'), "no weight_map"),
    "a truncated shard": (lambda f: (shards(f), os.truncate(f / "b.safetensors", 10000)), "b.safetensors is damaged"),
    # Pickles.
    "a list": (lambda f: pickled(f, [torch.zeros(1)]), "no dict of tensors"),
    "numbers": (lambda f: pickled(f, {"a": 1}), "'a' is not a tensor"),
    "numbered tensors": (lambda f: pickled(f, {0: torch.zeros(1)}), "'0' is not a tensor"),
    "a sparse tensor": (lambda f: pickled(f, {"a": torch.eye(3).to_sparse()}), "a is not a dense tensor"),
    "a tensor without data": (lambda f: pickled(f, {"a": torch.zeros(3, device="meta")}), "a is not a dense tensor"),
    "a tensor larger than its data": (lambda f: pickled(f, {"a": LARGER_THAN_ITS_DATA}), "less data"),
    "a dict that holds itself": (lambda f: pickled(f, (lambda d: d.update(model=d) or d)({})), "not a tensor"),
    "settings, which only official checkpoints may hold": (
        lambda f: pickled(f, {"args": argparse.Namespace(a=1)}),
        r"refused.*argparse\.Namespace",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_repository_loads_equal_or_gives_one_line(name, shared_repo, repo):
    change, message = CHANGES[name]
    change(repo)
    if message is EQUAL:
        assert equal_weights(DeformableDETR.from_pretrained(shared_repo), DeformableDETR.from_pretrained(repo))
        return
    refused = load_error(repo)
    assert re.search(message, refused), refused
    assert str(repo) in refused


def test_transformers_own_shards(shared_repo, tmp_path):
    tiny_transformers_model().save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert equal_weights(DeformableDETR.from_pretrained(shared_repo), DeformableDETR.from_pretrained(tmp_path))


def test_damaged_files(shared_checkpoint, repo, tmp_path, tiny_backbone):
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


def test_an_unreadable_file_is_not_called_damaged(repo, shared_checkpoint, monkeypatch):
    for source, file in [(repo, repo / "model.safetensors"), (shared_checkpoint, shared_checkpoint)]:
        access = os.access

        def denied(path, mode, file=file, access=access):
            return os.fspath(path) != os.fspath(file) and access(path, mode)

        with monkeypatch.context() as patch:
            patch.setattr(os, "access", denied)  # as for a user who is not root
            assert f"{file} cannot be read: permission denied" in load_error(source)


# --- malice -------------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def namespace_with_state(mark):
    """A harmless class whose state is a call."""
    space = argparse.Namespace()
    space.__dict__["x"] = Call(os.system, f"touch {mark}")
    return space


def nested_namespace(mark):
    hidden = Call(builtins.exec, f"open({mark!r}, 'w')")
    return {"model": {}, "args": argparse.Namespace(a=argparse.Namespace(b=[{"c": hidden}]))}


MALICE = {
    "os.system": lambda mark: Call(os.system, f"touch {mark}"),
    "eval": lambda mark: Call(builtins.eval, f"open({mark!r}, 'w')"),
    "open": lambda mark: Call(builtins.open, mark, "w"),
    "a Namespace inside a Namespace": nested_namespace,
    "a Namespace's state": namespace_with_state,
    "getattr": lambda mark: Call(builtins.getattr, Call(builtins.__import__, "os"), "system"),
    "torch's own loader": lambda mark: Call(torch.load, mark),
    "a tensor's reviver": lambda mark: {"model": {"transformer.level_embed": Call(pickle.loads, b"N.")}},
}
MARKING = list(MALICE)[:5]


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", MALICE)
def test_no_pickle_runs_code(name, protocol, tmp_path):
    mark = tmp_path / "mark"
    values = MALICE[name](str(mark))
    for path, zipped in ((tmp_path / "new.pth", True), (tmp_path / "old.pth", False)):
        torch.save(values, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(values, protocol=protocol))
    for path in sorted(tmp_path.glob("*.pth")):
        assert "refused" in load_error(path) or "damaged" in load_error(path)
    assert not mark.exists()
    if name in MARKING:  # the control: unpickling would have run it
        pickle.loads((tmp_path / "bare.pth").read_bytes())
        assert mark.exists()


@pytest.mark.parametrize("sharded", [False, True])
def test_no_pickle_of_a_repository_runs_code(sharded, repo, tmp_path):
    name = "part.bin" if sharded else "pytorch_model.bin"
    pickled(repo, {"model.level_embed": Call(os.system, f"touch {tmp_path / 'mark'}")}, name)
    if sharded:
        index = {"weight_map": {"model.level_embed": name}}
        (repo / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused = load_error(repo)
    assert f"{repo / name} is refused" in refused
    assert "system" in refused
    assert not (tmp_path / "mark").exists()


def write_zip(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def test_archives_that_are_not_checkpoints(shared_checkpoint, tmp_path):
    inner = pickle.dumps({"model": {}}, protocol=2)
    write_zip(tmp_path / "climbs.pth", {"../../climbed": b"x", "a/data.pkl": inner})
    write_zip(tmp_path / "bomb.pth", {"a/data.pkl": inner, "a/data/0": bytes(10**8)}, zipfile.ZIP_DEFLATED)
    write_zip(tmp_path / "empty.pth", {})
    write_zip(tmp_path / "script.pth", {"a/data.pkl": inner, "a/constants.pkl": inner, "a/code/x.py": b"1/0"})
    with tarfile.open(tmp_path / "tar.pth", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            content = pickle.dumps(Call(os.system, f"touch {tmp_path / 'mark'}"))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    content = shared_checkpoint.read_bytes()
    (tmp_path / "twice.pth").write_bytes(content[:1000] + content)
    for path in sorted(tmp_path.glob("*.pth")):
        refused = load_error(path)
        assert any(word in refused for word in ("damaged", "refused", "no dict"))
        assert str(path) in refused
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path.parent / "climbed").exists()
    assert "more than its own size" in load_error(tmp_path / "bomb.pth")


def test_the_command_line_prints_one_line_and_exits_with_2(repo, tmp_path, capsys):
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
            with pytest.raises(SystemExit) as stopped:
                cli.main(command)
            assert stopped.value.code == 2, command
            [line] = capsys.readouterr().err.strip().splitlines()
            assert line.startswith("error: "), command
