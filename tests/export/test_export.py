"""Exports from end to end: files that compute what the model does, say what they are, and are refused otherwise."""

import json
import os
import re
from collections import Counter

import numpy as np
import pytest
import torch

from deformable_detr.export import ExportOptions, export, export_model, load_exported
from deformable_detr.export.verify import example_inputs, max_differences
from deformable_detr.runtimes.metadata import ExportMetadata
from deformable_detr.utils.errors import UserError
from deformable_detr.utils.files import EXPORT_SUFFIXES
from tests.support.models import IDS, NAMES, tiny, write_pseudo_labeled_dataset

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SIZES = [(1, 97, 131), (2, 64, 64), (8, 33, 70)]


def batch(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count, height, width = size
    pixels = torch.randn(count, 3, height, width, generator=generator)
    mask = torch.zeros(count, height, width, dtype=torch.bool)
    for index in range(1, count):
        mask[index, height - 3 * index :] = True
        mask[index, :, width - 2 * index :] = True
    return pixels.masked_fill(mask[:, None], 0), mask


def agree(model, exported, sizes):
    for size in sizes:
        pixels, mask = batch(size)
        with torch.inference_mode():
            wanted = model(pixels, mask)
        found = exported(pixels, mask)
        torch.testing.assert_close(found["pred_logits"], wanted["pred_logits"], rtol=0, atol=1e-4)
        torch.testing.assert_close(found["pred_boxes"], wanted["pred_boxes"], rtol=0, atol=1e-5)


@pytest.fixture(scope="session")
def file(exported):
    return exported.path


def test_report(exported, file):
    assert exported.result.path == file
    assert [case.batch for case in exported.result.cases] == [1, 2, 5]
    assert sum(line.startswith("verified batch") for line in exported.lines) == 3
    assert [other.name for other in file.parent.iterdir()] == ["tiny.onnx"]  # nothing temporary is left


def test_any_batch_and_size(model, file):
    agree(model, load_exported(file), SIZES)


def test_openvino(model, converted, tmp_path):
    pytest.importorskip("openvino")
    path = tmp_path / "tiny.xml"
    result = export_model(model, path, "openvino", ExportOptions(post_processing=True))
    assert [case.batch for case in result.cases] == [1, 2, 5]
    assert sorted(other.name for other in tmp_path.iterdir()) == ["tiny.bin", "tiny.xml"]
    exported = load_exported(path)
    config = export.self_contained_config(model)
    assert exported.metadata == ExportMetadata(config, None, "fp32", "grid_sample", True)
    agree(model, exported, SIZES)


def test_metadata(model, file):
    import onnx

    exported = load_exported(file)
    assert (exported.config.class_names, exported.config.category_ids) == (NAMES, IDS)
    assert torch.equal(exported.pixel_mean, model.pixel_mean)
    assert torch.equal(exported.pixel_std, model.pixel_std)
    assert (exported.config.image_size, exported.config.long_side) == (96, model.config.long_side)
    said = {entry.key: json.loads(entry.value) for entry in onnx.load(file).metadata_props}
    assert said["class_names"] == list(NAMES)
    assert said["short_side"] == 96
    assert said["image_size"] is None


def test_graph(file):
    """Open dimensions with names, and no batch norm."""
    import onnx

    graph = onnx.load(file).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["GridSample"] == 3  # a layer and level
    assert kinds["BatchNormalization"] == 0
    shape = graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ["batch", 3, "height", "width"]
    assert {v.name for v in graph.output} == {"pred_logits", "pred_boxes", "boxes", "scores", "labels"}


PLAIN = {"decoder_layers": 2, "refine": False, "two_stage": False, "query_init": "box", "class_aware_proposals": False}


@pytest.mark.slow
def test_one_reference_for_all_decoder_layers(tmp_path):
    """The paper's plain form: every layer takes the logit of the same points, which an exporter wants to merge."""
    model = tiny(**PLAIN)
    export_model(model, tmp_path / "tiny.onnx", "onnx")
    agree(model, load_exported(tmp_path / "tiny.onnx"), SIZES[:1])


def test_fixed_size_and_gather_form_on_the_command_line(tmp_path, capsys):
    """Of the plain form, without post-processing."""
    import onnx

    from deformable_detr.cli import main

    model = tiny(**{**PLAIN, "decoder_layers": 1})
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "fixed.onnx"
    main(["export", str(tmp_path / "model"), "--to", "onnx", "--out", str(path), "--image-size", "64,96",
          "--sampling", "gather"])  # fmt: skip
    assert "verified batch 5 of 64×96" in capsys.readouterr().out
    assert not any(node.op_type == "GridSample" for node in onnx.load(path).graph.node)
    exported = load_exported(path)
    assert exported.canvas == (64, 96)
    agree(model, exported, [(1, 64, 96), (3, 64, 96)])
    image = np.random.default_rng(0).integers(0, 255, (140, 90, 3), np.uint8)  # portrait: fits, with padding
    assert len(exported.predict(image, threshold=0.0)) == 12 * 3
    with pytest.raises(UserError, match=r"65×96 pixels exceed the exported size 64×96"):
        exported(torch.zeros(1, 3, 65, 96))


def test_an_exported_file_has_its_own_precision():
    from deformable_detr.detector import load_detector

    with pytest.raises(UserError, match=r"model\.onnx: an exported file has a fixed precision"):
        load_detector("model.onnx", "cpu", "bf16")


def test_predicts_as_the_folder_does(model, file, tmp_path):
    from PIL import Image

    from deformable_detr.cli import main

    model.save_pretrained(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 255, (90, 140, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    found = []
    for source in (tmp_path / "model", file):
        main(["predict", str(source), str(tmp_path / "image.png"), "--threshold", "0", "--device", "cpu",
              "--json", str(tmp_path / "found.json")])  # fmt: skip
        found.append(json.loads((tmp_path / "found.json").read_text())[0]["detections"])
    assert len(found[0]) == len(found[1]) == 36
    for one, other in zip(*found, strict=True):
        assert (one["name"], one["category_id"]) == (other["name"], other["category_id"])
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        assert one["box"] == pytest.approx(other["box"], abs=0.05)


def test_is_evaluated_as_the_folder_is(model, file, tmp_path):
    from deformable_detr.cli import main

    model.save_pretrained(tmp_path / "model")
    root = write_pseudo_labeled_dataset(tmp_path / "set", model)
    figures = []
    for source in (tmp_path / "model", file):
        main(["evaluate", str(source), str(root), "--device", "cpu", "--workers", "0", "--batch-size", "2",
              "--json", str(tmp_path / "figures.json")])  # fmt: skip
        figures.append(json.loads((tmp_path / "figures.json").read_text()))
    assert figures[0]["AP"] > 0.1
    for key in ("AP", "AP50", "AR100"):
        assert figures[1][key] == pytest.approx(figures[0][key], abs=0.01)


def test_torch_and_a_tampered_export_is_refused(tmp_path, monkeypatch):
    """One weight changed a little between tracing and writing: nothing is written, and what was there stays."""
    model, options = tiny(), ExportOptions(image_size=(64, 96))
    traced, trace = [], export.trace
    monkeypatch.setattr(export, "trace", lambda *arguments: traced.append(trace(*arguments)) or traced[0])
    path = tmp_path / "model.pt2"
    export_model(model, path, "torch", options)
    exported = load_exported(path)
    assert exported.metadata.image_size == (64, 96)
    agree(model, exported, [(1, 64, 96), (3, 64, 96)])

    before = path.read_bytes()
    name = next(key for key in traced[0].state_dict if key.endswith("value_proj.weight"))
    traced[0].state_dict[name][0, 0] += 0.5
    monkeypatch.setattr(export, "trace", lambda *_: traced[0])
    with pytest.raises(UserError, match=r"refused: the exported file differs from the model, batch 1"):
        export_model(model, path, "torch", options)
    assert path.read_bytes() == before
    assert [other.name for other in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "a.xml", "to": "onnx"}, "must end in .onnx"),
        ({"out": "a.onnx", "to": "onnx", "precision": "fp16"}, "needs --data"),
        ({"out": "a.onnx", "to": "onnx", "image_size": (8, 64)}, "each side must be at least 32 pixels"),
        ({"out": "a" * 300 + ".onnx", "to": "onnx"}, ".onnx: cannot be written: File name too long"),
        ({"out": "a" * 300 + ".xml", "to": "openvino"}, ".xml: cannot be written: File name too long"),
    ],
)
def test_mistakes_are_named(model, tmp_path, options, message):
    out, to = tmp_path / options.pop("out"), options.pop("to")
    with pytest.raises(UserError, match=re.escape(message)):
        export_model(model, out, to, ExportOptions(**options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", [False, True])
def test_weights_beside_openvinos_graph_replace_nothing_else(model, tmp_path, folder):
    other = tmp_path / "pytorch_model.bin"
    other.mkdir() if folder else other.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"its weights would replace .*pytorch_model\.bin, another file"):
        export_model(model, tmp_path / "pytorch_model.xml", "openvino")
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


@pytest.mark.parametrize("fails", ["a.bin", "a.xml", None])
def test_a_graph_never_lies_beside_the_weights_of_another_export(fails, tmp_path, monkeypatch):
    """Wherever putting the two files in place ends, what can be opened belongs together."""
    new = tmp_path / "new"
    new.mkdir()
    for folder in (tmp_path, new):
        for name in ("a.xml", "a.bin"):
            (folder / name).write_text(folder.name)
    replace = os.replace

    def failing(source, target):
        if target == tmp_path / fails and source.parent == new and source.name == fails:
            raise PermissionError(13, "in use")
        replace(source, target)

    if fails:
        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(PermissionError):
            export.move_into_place(new, tmp_path / "a.xml")
    else:
        export.move_into_place(new, tmp_path / "a.xml")
    found = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    old = dict.fromkeys(("a.xml", "a.bin"), tmp_path.name)
    assert found == {"a.bin": old, "a.xml": {"a.bin": "new"}, None: dict.fromkeys(old, "new")}[fails]


def test_sizes_that_no_memory_holds_are_named(model, tmp_path):
    with pytest.raises(UserError, match=r"out of memory: choose a smaller --image-size$"):
        export_model(model, tmp_path / "a.pt2", "torch", ExportOptions(image_size=(2**24, 2**24)))
    assert not list(tmp_path.iterdir())


def test_foreign_and_broken_files_are_named(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match=r"foreign\.onnx was not written by `deformable-detr export`"):
        load_exported(tmp_path / "foreign.onnx")
    for name in ("broken.onnx", "broken.pt2", "broken.xml"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(UserError, match=re.escape(name)):
            load_exported(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        load_exported(tmp_path / "nowhere.onnx")


def test_metadata_survives_a_round_trip():
    metadata = ExportMetadata(tiny().config, None, "fp32", "gather", False)
    assert ExportMetadata.from_strings(metadata.to_strings(), "file") == metadata


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "openvino", "torch"])
def test_every_format_any_size(kind, tmp_path):
    """Two levels, open sizes; the metadata comes back from each format."""
    pytest.importorskip(kind)
    model = tiny(num_feature_levels=2)
    path = tmp_path / f"tiny{EXPORT_SUFFIXES[kind]}"
    export_model(model, path, kind)
    exported = load_exported(path)
    config = export.self_contained_config(model)
    assert exported.metadata == ExportMetadata(config, None, "fp32", "grid_sample", False)
    agree(model, exported, SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "openvino", "torch"])
@pytest.mark.parametrize("sampling", ["grid_sample", "gather"])
@pytest.mark.parametrize("preset", ["small", "two-stage", "multi-scale"])
def test_full_size(kind, sampling, preset, tmp_path):
    """Batches 1, 2, 5 and 8 at three sizes."""
    from deformable_detr.config import presets
    from deformable_detr.detector import DeformableDETR
    from tests.support.models import randomized

    pytest.importorskip(kind if kind == "openvino" else "onnx")
    torch.manual_seed(0)
    # With a spread of 0.15 a full-size model is so unsteady that its own fp32 is 4e-4 off its fp64.
    model = DeformableDETR(presets.PRESETS[preset](backbone_weights="none", num_classes=4, image_size=320))
    model = randomized(model, spread=0.05)
    path = tmp_path / f"model{EXPORT_SUFFIXES[kind]}"
    export_model(model, path, kind, ExportOptions(sampling=sampling))
    exported = load_exported(path, "cpu")
    for height, width in ((256, 320), (203, 331), (319, 161)):
        for count in (1, 2, 5, 8):
            pixels, mask, wanted = example_inputs(model, count, height, width)
            logits, boxes = max_differences(wanted, exported(pixels, mask))
            assert logits <= 1e-3, (count, height, width)
            assert boxes <= 1e-4, (count, height, width)
    if kind == "onnx":
        import onnx

        kinds = Counter(node.op_type for node in onnx.load(path).graph.node)
        assert (kinds["GridSample"] == 0) == (sampling == "gather")
