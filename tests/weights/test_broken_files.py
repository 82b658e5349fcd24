"""Sources as people and crawlers leave them: each loads equal to the whole one, or gives one clear line."""

import argparse
import builtins
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file

from deformable_detr import DeformableDETR, UserError, cli
from deformable_detr.config import presets
from deformable_detr.weights import official_format, transformers_format
from tests.weights.test_load import edit, ours, same

EQUAL = None


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model, and a folder with a transformers repository of it."""
    folder = tmp_path_factory.mktemp("whole")
    model = ours(presets.refine, backbone_norm="frozen")
    transformers_format.save(model, folder / "repo")
    return model, folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A model, and an official checkpoint of it."""
    folder = tmp_path_factory.mktemp("published")
    model = ours(presets.refine, backbone="resnet50", num_heads=8)
    official_format.save(model, folder)
    return model, folder / official_format.FILE


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def put(folder, tensors, **metadata):
    save_file(
        {name: value.clone().contiguous() for name, value in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt", **metadata},
    )


def pickled(folder, values, name="pytorch_model.bin"):
    (folder / "model.safetensors").unlink()
    torch.save(values, folder / name)


def header(folder, change):
    """The safetensors file with another header before the same data."""
    content = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    described = change(json.loads(content[8 : 8 + length]))
    text = described if isinstance(described, bytes) else json.dumps(described).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def renamed(folder, rename):
    put(folder, {rename(name): value for name, value in tensors_of(folder).items()})


def shards(folder, names=("a.safetensors", "b.safetensors"), **changes):
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    listed = {}
    for i, name in enumerate(names):
        part = dict(list(tensors.items())[i :: len(names)])
        save_file(part, folder / name, metadata={"format": "pt"})
        listed |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**listed, **changes}}))


def text(folder, change, name="config.json", **options):
    path = folder / name
    path.write_bytes(change(path.read_text(encoding="utf-8")))


def without(folder, *keys):
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in keys}))


def linked(folder):
    """As the hub's cache lays it out."""
    for file in list(folder.iterdir()):
        file.rename(folder.parent / f"blob-{file.name}")
        file.symlink_to(folder.parent / f"blob-{file.name}")


def half(folder, dtype):
    put(folder, {n: v.to(dtype) if v.is_floating_point() else v for n, v in tensors_of(folder).items()})


TINY_STRIDES = torch.zeros(1).expand(10**6, 10**6)

REPOSITORIES = {
    # What loads, because nothing is lost by it.
    "as it is": (lambda f: None, EQUAL),
    "byte order mark": (lambda f: text(f, lambda t: b"\xef\xbb\xbf" + t.encode()), EQUAL),
    "symbolic links": (linked, EQUAL),
    "shards": (shards, EQUAL),
    "a shard that nobody lists": (
        lambda f: (shards(f), save_file({"x": torch.zeros(1)}, f / "model-00009.safetensors")),
        EQUAL,
    ),
    "prefix of DistributedDataParallel": (lambda f: renamed(f, lambda n: f"module.{n}"), EQUAL),
    "prefix of torch.compile": (lambda f: renamed(f, lambda n: f"_orig_mod.{n}"), EQUAL),
    "prefix of Lightning": (lambda f: renamed(f, lambda n: f"model.{n}"), EQUAL),
    "two prefixes": (lambda f: renamed(f, lambda n: f"module._orig_mod.{n}"), EQUAL),
    "Lightning checkpoint": (
        lambda f: pickled(f, {"epoch": 3, "state_dict": {f"model.{n}": v for n, v in tensors_of(f).items()}}),
        EQUAL,
    ),
    "averaged weights": (
        lambda f: pickled(f, {"ema": {"module": tensors_of(f), "updates": 7}, "optimizer": {}}),
        EQUAL,
    ),
    "ordered dict": (lambda f: pickled(f, OrderedDict(tensors_of(f))), EQUAL),
    "unknown keys in the config": (lambda f: edit(f / "config.json", color="red", auxiliary_loss=True), EQUAL),
    "no image processor": (lambda f: (f / "preprocessor_config.json").unlink(), EQUAL),
    "null in the image size": (
        lambda f: edit(f / "preprocessor_config.json", size={"shortest_edge": 800, "longest_edge": None}),
        EQUAL,
    ),
    "no label2id": (lambda f: without(f, "label2id"), EQUAL),
    "no architectures, no dtype": (lambda f: without(f, "architectures", "dtype"), EQUAL),
    "names twice": (lambda f: edit(f / "config.json", id2label={"0": "a", "1": "a", "2": "a"}), EQUAL),
    "a name that is a number": (lambda f: edit(f / "config.json", id2label={"0": 0, "1": "b", "2": 2.5}), EQUAL),
    "a name that is null": (lambda f: edit(f / "config.json", id2label={"0": None, "1": "b", "2": "c"}), EQUAL),
    "a gap in the labels": (lambda f: edit(f / "config.json", id2label={"0": "a", "2": "c"}), EQUAL),
    "our own config in the header is nonsense": (
        lambda f: put(f, tensors_of(f), **{"deformable-detr": "[" * 99999}),
        EQUAL,
    ),
    "our own config in the header is of other classes": (
        lambda f: put(
            f, tensors_of(f), **{"deformable-detr": '{"num_classes": 2, "category_ids": [1, 2], "backbone": "x"}'}
        ),
        EQUAL,
    ),
    # Config.
    "config is a list": (lambda f: text(f, lambda t: b"[]"), "no JSON object"),
    "config is a number": (lambda f: text(f, lambda t: b"7"), "no JSON object"),
    "config is UTF-16": (lambda f: text(f, lambda t: t.encode("utf-16")), "not valid JSON"),
    "config is YAML": (lambda f: text(f, lambda t: b"model_type: deformable_detr\n"), "not valid JSON"),
    "config is a folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "no config.json"),
    "config is huge": (lambda f: os.truncate(f / "config.json", 2**33), "8192 MiB"),
    "config hangs in the air": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").symlink_to("gone")),
        "no config.json",
    ),
    "config is of another model": (lambda f: edit(f / "config.json", model_type="rt_detr"), "'rt_detr'"),
    "config has no model type": (lambda f: without(f, "model_type"), "None"),
    "config lacks the width": (lambda f: without(f, "d_model"), "config.json"),
    "config lacks the levels": (lambda f: edit(f / "config.json", num_feature_levels=1), "config.json|feature maps"),
    "config lacks the refinement": (lambda f: without(f, "with_box_refine"), "unknown tensor|differ"),
    "config has more layers": (lambda f: edit(f / "config.json", decoder_layers=3), "lacks"),
    "config has fewer layers": (lambda f: edit(f / "config.json", encoder_layers=0), "unknown tensor"),
    "config has a number as a word": (lambda f: edit(f / "config.json", num_queries="many"), "num_queries"),
    "config has a huge number": (lambda f: text(f, lambda t: t.replace("20", "9" * 5000, 1).encode()), "JSON"),
    "config has NaN": (lambda f: edit(f / "config.json", dropout=float("nan")), "dropout"),
    "config has lists for numbers": (lambda f: edit(f / "config.json", d_model=[256]), "d_model"),
    "config has no classes": (lambda f: edit(f / "config.json", id2label={}), "id2label"),
    "classes are a million million": (
        lambda f: (without(f, "id2label"), edit(f / "config.json", num_labels=10**12)),
        "num_labels",
    ),
    "a label is a million million": (lambda f: edit(f / "config.json", id2label={"1000000000000": "a"}), "no label"),
    "labels and names changed places": (lambda f: edit(f / "config.json", id2label={"cat": "0"}), "'cat'"),
    "a label below zero": (lambda f: edit(f / "config.json", id2label={"-1": "a", "0": "b"}), "'-1'"),
    "a name that is a list": (lambda f: edit(f / "config.json", id2label={"0": ["a"]}), "label 0"),
    "a class too many": (lambda f: edit(f / "config.json", id2label=dict.fromkeys("0123", "a")), "shape|anything"),
    "a class too few": (lambda f: edit(f / "config.json", id2label=dict.fromkeys("01", "a")), "shape"),
    "no names, another number": (lambda f: without(f, "id2label", "label2id"), "shape"),
    "a backbone that timm lacks": (
        lambda f: edit(f / "config.json", backbone_config={"model_type": "timm_backbone", "backbone": "../evil"}),
        "no timm model",
    ),
    "a backbone from the hub": (
        lambda f: edit(f / "config.json", backbone_config={"model_type": "timm_backbone", "backbone": "hf-hub:a/b"}),
        "no timm model",
    ),
    "a backbone's unknown weights": (
        lambda f: edit(
            f / "config.json",
            backbone_config={"model_type": "timm_backbone", "backbone": "resnet50.evil", "out_indices": [2, 3, 4]},
        ),
        "resnet50.evil",
    ),
    "image processor is a list": (lambda f: text(f, lambda t: b"[]", "preprocessor_config.json"), "no JSON object"),
    "image size is endless": (
        lambda f: edit(f / "preprocessor_config.json", size={"shortest_edge": 10**9, "longest_edge": 10**9}),
        "pixels",
    ),
    "image size is infinite": (lambda f: edit(f / "preprocessor_config.json", size={"height": float("inf")}), "number"),
    "image size is nothing": (lambda f: edit(f / "preprocessor_config.json", size={"shortest_edge": 0}), "pixels"),
    "gray statistics": (lambda f: edit(f / "preprocessor_config.json", image_mean=[0.5], image_std=[0.5]), "3 numbers"),
    "deviation of nothing": (lambda f: edit(f / "preprocessor_config.json", image_std=[0, 1, 1]), "pixel_std"),
    # Weights.
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "weights are a folder": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
        "no weights",
    ),
    "weights are empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "broken"),
    "weights are a pointer of git": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "broken",
    ),
    "weights are a pickle with a false name": (
        lambda f: torch.save({"a": torch.zeros(1)}, f / "model.safetensors"),
        "broken",
    ),
    "weights of another model": (lambda f: put(f, {"bert.encoder.weight": torch.zeros(3)}), "anything|lacks"),
    "weights without the heads": (
        lambda f: put(f, {n: v for n, v in tensors_of(f).items() if n.startswith("model.")}),
        "lacks",
    ),
    "another number of queries": (
        lambda f: put(f, {**tensors_of(f), "model.query_position_embeddings.weight": torch.zeros(7, 128)}),
        "shape",
    ),
    "transposed": (
        lambda f: put(f, {n: v.t() if n.endswith("fc1.weight") else v for n, v in tensors_of(f).items()}),
        "shape",
    ),
    "whole numbers": (lambda f: half(f, torch.int8), "int8 numbers"),
    "complex numbers": (lambda f: half(f, torch.complex64), "complex64 numbers"),
    "header is longer than the file": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        "broken",
    ),
    "header is no JSON": (lambda f: header(f, lambda h: b"{" * 64), "broken"),
    "header is a list": (lambda f: header(f, lambda h: []), "broken"),
    "header has an unknown type": (
        lambda f: header(f, lambda h: {n: {**v, "dtype": "F1"} if "dtype" in v else v for n, v in h.items()}),
        "broken",
    ),
    "header's places overlap": (
        lambda f: header(f, lambda h: {n: {**v, "data_offsets": [0, 4]} if "dtype" in v else v for n, v in h.items()}),
        "broken",
    ),
    "header's shapes are endless": (
        lambda f: header(f, lambda h: {n: {**v, "shape": [2**62, 9]} if "dtype" in v else v for n, v in h.items()}),
        "broken",
    ),
    # Indices.
    "index lists what is gone": (lambda f: shards(f, extra="c.safetensors"), "c.safetensors"),
    "index goes up": (lambda f: shards(f, extra="../ours/model.safetensors"), "not a file beside it"),
    "index goes to the root": (lambda f: shards(f, extra="/etc/passwd"), "not a file beside it"),
    "index has an endless name": (lambda f: shards(f, extra="x" * 5000), "not a file beside it"),
    "index has a null": (lambda f: shards(f, extra=None), "None"),
    "index lists a tensor that is in none": (lambda f: shards(f, extra="a.safetensors"), "extra"),
    "index is a list": (
        lambda f: (shards(f), (f / "model.safetensors.index.json").write_text("[]")),
        "no JSON object",
    ),
    "index has no map": (
        lambda f: (shards(f), (f / "model.safetensors.index.json").write_text('{"metadata": {}}')),
        "weight_map",
    ),
    "a shard is cut": (lambda f: (shards(f), os.truncate(f / "b.safetensors", 10000)), "b.safetensors is broken"),
    # Pickles.
    "pickle holds a list": (lambda f: pickled(f, [torch.zeros(1)]), "no dict"),
    "pickle holds numbers": (lambda f: pickled(f, {"a": 1}), "no tensor"),
    "pickle has numbered tensors": (lambda f: pickled(f, {0: torch.zeros(1)}), "no tensor"),
    "pickle holds a sparse tensor": (lambda f: pickled(f, {"a": torch.eye(3).to_sparse()}), "dense"),
    "pickle holds a tensor of no data": (lambda f: pickled(f, {"a": torch.zeros(3, device="meta")}), "dense"),
    "pickle holds a tensor larger than its data": (lambda f: pickled(f, {"a": TINY_STRIDES}), "less data"),
    "pickle holds itself": (lambda f: pickled(f, (lambda d: d.update(model=d) or d)({})), "no tensor|no dict"),
}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_repository_loads_equal_or_says_one_line(name, whole, tmp_path):
    model, folder = whole
    shutil.copytree(folder / "repo", tmp_path / "repo")
    damage, message = REPOSITORIES[name]
    damage(tmp_path / "repo")
    if message is EQUAL:
        assert same(model, DeformableDETR.from_pretrained(tmp_path / "repo"))
        return
    with pytest.raises(UserError, match=message) as caught:
        DeformableDETR.from_pretrained(tmp_path / "repo")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert str(tmp_path) in str(caught.value) or "backbone" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_half_the_precision_are_those_numbers(dtype, whole, tmp_path):
    model, folder = whole
    shutil.copytree(folder / "repo", tmp_path / "repo")
    half(tmp_path / "repo", dtype)
    found = DeformableDETR.from_pretrained(tmp_path / "repo")
    for name, value in model.state_dict().items():
        there = found.state_dict()[name]
        assert there.dtype == value.dtype
        assert torch.equal(there, value.to(dtype).to(value.dtype) if value.is_floating_point() else value)


def test_names_and_ids_of_labels_with_a_gap(whole, tmp_path):
    shutil.copytree(whole[1] / "repo", tmp_path / "repo")
    edit(tmp_path / "repo" / "config.json", id2label={"2": "c", "0": "a"})
    found = DeformableDETR.from_pretrained(tmp_path / "repo").config
    assert found.class_names == ("a", "LABEL_1", "c")
    assert found.category_ids == (0, 1, 2)


# --- official checkpoints -----------------------------------------------------------------------------------------


def settings(values, **changes):
    return {**values, "args": argparse.Namespace(**{**vars(values["args"]), **changes})}


CHECKPOINTS = {
    "as it is": (lambda v: v, EQUAL),
    "without settings": (lambda v: {"model": v["model"]}, EQUAL),
    "settings as a dict": (lambda v: {**v, "args": vars(v["args"])}, EQUAL),
    "settings of another kind": (lambda v: {**v, "args": [1, 2]}, EQUAL),
    "settings hold tensors": (lambda v: settings(v, backbone=torch.zeros(3), dec_layers=torch.ones(2)), EQUAL),
    "settings hold more": (lambda v: settings(v, nested=argparse.Namespace(a=argparse.Namespace(b=[1]))), EQUAL),
    "tensors alone": (lambda v: v["model"], EQUAL),
    "averaged weights": (lambda v: {"model_ema": v["model"], "args": v["args"], "epoch": 3}, EQUAL),
    "averaged weights in a module": (lambda v: {"ema": {"module": v["model"]}, "args": v["args"]}, EQUAL),
    "prefixes": (lambda v: {**v, "model": {f"module.{n}": t for n, t in v["model"].items()}}, EQUAL),
    "optimizer beside it": (lambda v: {**v, "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "epoch": 49}, EQUAL),
    "our own config is nonsense": (lambda v: {**v, official_format.OWN: {"model": {"num_classes": "x"}}}, EQUAL),
    "our own config is of other classes": (
        lambda v: {**v, official_format.OWN: {"model": {"num_classes": 9, "category_ids": list(range(9))}}},
        EQUAL,
    ),
    "no heads to count": (lambda v: settings(v, nheads="eight"), "eight"),
    "no heads at all": (lambda v: settings(v, nheads=0), "odd"),
    "a negative number of heads": (lambda v: settings(v, nheads=-8), "num_heads|point"),
    "other levels": (lambda v: settings(v, num_feature_levels=1), "settings say num_feature_levels"),
    "another backbone": (lambda v: settings(v, backbone="resnet101"), "lacks"),
    "an unknown backbone": (lambda v: settings(v, backbone="swin_t"), "swin_t"),
    "half of the tensors": (lambda v: {**v, "model": dict(list(v["model"].items())[::2])}, "lacks|no whole"),
    "no levels": (lambda v: {**v, "model": {n: t for n, t in v["model"].items() if "level" not in n}}, "level_embed"),
    "levels of another shape": (
        lambda v: {**v, "model": {**v["model"], "transformer.level_embed": torch.zeros(4)}},
        "no whole",
    ),
    "a layer of an endless number": (
        lambda v: {**v, "model": {**v["model"], "transformer.decoder.layers.99999999.x": torch.zeros(1)}},
        "decoder_layers|settings say",
    ),
    "a tensor larger than its data": (
        lambda v: {**v, "model": {**v["model"], "transformer.level_embed": TINY_STRIDES}},
        "less data",
    ),
    "a model object's settings": (lambda v: {"args": v["args"], "epoch": 1}, "no tensor"),
    "nothing": (lambda v: {}, "no dict"),
    "copies that differ": (
        lambda v: {**v, "model": {**v["model"], "transformer.decoder.bbox_embed.0.layers.2.bias": torch.ones(4)}},
        "differ",
    ),
}


@pytest.mark.slow  # a ResNet-50 for each
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_loads_equal_or_says_one_line(name, published, tmp_path):
    model, whole = published
    values = torch.load(whole, weights_only=False, mmap=True)
    damage, message = CHECKPOINTS[name]
    path = tmp_path / "checkpoint.pth"
    torch.save(damage({key: value for key, value in values.items() if key != official_format.OWN}), path)
    if message is EQUAL:
        found = DeformableDETR.from_pretrained(path)
        for key, value in found.state_dict().items():
            assert torch.equal(value, model.state_dict()[key]), key
        return
    with pytest.raises(UserError, match=message) as caught:
        DeformableDETR.from_pretrained(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


# --- malice -------------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evil_namespace(mark):
    """Settings that hide a call deep inside."""
    hidden = Call(builtins.exec, f"open({mark!r}, 'w')")
    return {"model": {}, "args": argparse.Namespace(a=argparse.Namespace(b=[{"c": hidden}]))}


def opened_by_state(mark):
    """A harmless class whose state is a call."""
    space = argparse.Namespace()
    space.__dict__["x"] = Call(os.system, f"touch {mark}")
    return space


MALICE = {
    "os.system": lambda mark: Call(os.system, f"touch {mark}"),
    "eval": lambda mark: Call(builtins.eval, f"open({mark!r}, 'w')"),
    "a Namespace inside a Namespace": evil_namespace,
    "a Namespace's state": opened_by_state,
    "open": lambda mark: Call(builtins.open, mark, "w"),
    "getattr": lambda mark: Call(builtins.getattr, Call(builtins.__import__, "os"), "system"),
    "torch's own loader": lambda mark: Call(torch.load, mark),
    "a tensor's reviver": lambda mark: {"model": {"transformer.level_embed": Call(pickle.loads, b"N.")}},
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", MALICE)
def test_no_pickle_is_obeyed(name, protocol, tmp_path):
    mark = tmp_path / "mark"
    values = MALICE[name](str(mark))
    for path, zipped in ((tmp_path / "new.pth", True), (tmp_path / "old.pth", False)):
        torch.save(values, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(values, protocol=protocol))
    for path in sorted(tmp_path.glob("*.pth")):
        with pytest.raises(UserError, match=r"refused|broken") as caught:
            DeformableDETR.from_pretrained(path)
        assert "\n" not in str(caught.value)
    assert not mark.exists()
    if name in ("os.system", "eval", "open", "a Namespace inside a Namespace", "a Namespace's state"):  # the control
        pickle.loads((tmp_path / "bare.pth").read_bytes())
        assert mark.exists()


def zip_of(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def test_archives_that_are_no_checkpoints(published, tmp_path):
    inner = pickle.dumps({"model": {}}, protocol=2)
    zip_of(tmp_path / "climbs.pth", {"../../climbed": b"x", "a/data.pkl": inner})
    zip_of(tmp_path / "swollen.pth", {"a/data.pkl": inner, "a/data/0": bytes(10**8)}, zipfile.ZIP_DEFLATED)
    zip_of(tmp_path / "empty.pth", {})
    zip_of(tmp_path / "script.pth", {"a/data.pkl": inner, "a/constants.pkl": inner, "a/code/x.py": b"1/0"})
    with tarfile.open(tmp_path / "tar.pth", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            content = pickle.dumps(Call(os.system, f"touch {tmp_path / 'mark'}"))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    content = published[1].read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[:-1000])
    (tmp_path / "twice.pth").write_bytes(content[:1000] + content)
    for path in sorted(tmp_path.glob("*.pth")):
        with pytest.raises(UserError, match=r"broken|refused|no dict") as caught:
            DeformableDETR.from_pretrained(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path.parent / "climbed").exists()
    assert "more than its own size" in refusal(tmp_path / "swollen.pth")


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        DeformableDETR.from_pretrained(path)
    return str(caught.value)


def test_names_that_are_no_places(tmp_path):
    for name in ("x" * 5000, "a/" * 3000, "nul\0", "", "~/nowhere/at/all", "https://example.org/model.pth"):
        assert "\n" not in refusal(name)


def test_the_command_line_says_one_line_and_exits_with_2(whole, tmp_path, capsys):
    shutil.copytree(whole[1] / "repo", tmp_path / "repo")
    edit(tmp_path / "repo" / "config.json", encoder_layers=7)
    torch.save(Call(os.system, "true"), tmp_path / "evil.pth")
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    picture = str(tmp_path / "image.png")
    for model in (tmp_path / "repo", tmp_path / "evil.pth", tmp_path / "gone"):
        for verb in (
            ["predict", str(model), picture],
            ["evaluate", str(model), str(tmp_path)],
            ["explain", str(model), picture],
            ["export", str(model), "--to", "onnx", "--out", str(tmp_path / "m.onnx")],
            ["convert", str(model), "--to", "ours", "--out", str(tmp_path / "out")],
            ["train", str(tmp_path), "--weights", str(model), "--out", str(tmp_path / "run")],
        ):
            with pytest.raises(SystemExit) as stopped:
                cli.main(verb)
            assert stopped.value.code == 2, verb
            said = capsys.readouterr().err.strip().splitlines()
            assert len(said) == 1, (verb, said)
            assert said[0].startswith("error: "), (verb, said)


def test_a_file_that_may_not_be_read_is_not_called_broken(whole, published, monkeypatch):
    for source, file in [(whole[1] / "repo", whole[1] / "repo/model.safetensors"), (published[1], published[1])]:
        access = os.access

        def denied(path, mode, file=file, access=access):
            return os.fspath(path) != os.fspath(file) and access(path, mode)

        with monkeypatch.context() as patch:
            patch.setattr(os, "access", denied)  # as for a user who is not root
            assert f"{file} cannot be read: Permission denied; make it readable" in refusal(source)
