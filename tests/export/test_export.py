"""Exports end to end: the file matches the model and has its metadata, or is not written."""

import json
import os
import re
from collections import Counter

import numpy as np
import pytest
import torch

from deformable_detr.export import ExportOptions, export, export_model, load_exported
from deformable_detr.export.formats import write_file
from deformable_detr.export.verify import example_inputs, max_differences
from deformable_detr.runtimes.metadata import ExportMetadata
from deformable_detr.utils.errors import UserError
from deformable_detr.utils.files import EXPORT_SUFFIXES
from tests.support.models import IDS, NAMES, tiny, write_pseudo_labeled_dataset
from tests.support.special_files import needs_pipes, replace_by_pipe, time_limit

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


def assert_outputs_match(model, exported, sizes):
    for size in sizes:
        pixels, mask = batch(size)
        with torch.inference_mode():
            expected = model(pixels, mask)
        actual = exported(pixels, mask)
        torch.testing.assert_close(actual["pred_logits"], expected["pred_logits"], rtol=0, atol=1e-4)
        torch.testing.assert_close(actual["pred_boxes"], expected["pred_boxes"], rtol=0, atol=1e-5)


@pytest.fixture(scope="session")
def file(exported):
    return exported.path


def test_report(exported, file):
    assert exported.result.path == file
    assert [case.batch for case in exported.result.cases] == [1, 2, 5]
    assert sum(line.startswith("verified batch") for line in exported.lines) == 3
    assert [other.name for other in file.parent.iterdir()] == ["tiny.onnx"]  # no temporary file left


def test_any_batch_and_size(model, file):
    assert_outputs_match(model, load_exported(file), SIZES)


def test_unknown_target_is_refused(file, tmp_path):
    with pytest.raises(ValueError, match="unknown export target 'tflite'"):
        write_file("tflite", None, tmp_path / "tiny.tflite", load_exported(file).metadata)


def test_openvino(model, converted, tmp_path):
    pytest.importorskip("openvino")
    path = tmp_path / "tiny.xml"
    result = export_model(model, path, "openvino", ExportOptions(post_processing=True))
    assert [case.batch for case in result.cases] == [1, 2, 5]
    assert sorted(other.name for other in tmp_path.iterdir()) == ["tiny.bin", "tiny.xml"]
    exported = load_exported(path)
    config = model.export_config()
    assert exported.metadata == ExportMetadata(config, None, "fp32", "grid_sample", True)
    assert_outputs_match(model, exported, SIZES)


def test_metadata(model, file):
    import onnx

    exported = load_exported(file)
    assert (exported.config.class_names, exported.config.category_ids) == (NAMES, IDS)
    assert torch.equal(exported.pixel_mean, model.pixel_mean)
    assert torch.equal(exported.pixel_std, model.pixel_std)
    assert (exported.config.image_size, exported.config.long_side) == (96, model.config.long_side)
    properties = {entry.key: json.loads(entry.value) for entry in onnx.load(file).metadata_props}
    assert properties["class_names"] == list(NAMES)
    assert properties["short_side"] == 96
    assert properties["image_size"] is None


def test_graph(file):
    import onnx

    graph = onnx.load(file).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["GridSample"] == 3  # one per layer and level
    assert kinds["BatchNormalization"] == 0
    shape = graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ["batch", 3, "height", "width"]
    assert {v.name for v in graph.output} == {"pred_logits", "pred_boxes", "boxes", "scores", "labels"}


PLAIN = {"decoder_layers": 2, "refine": False, "two_stage": False, "query_init": "box", "class_aware_proposals": False}


@pytest.mark.slow
def test_shared_reference_points_of_all_decoder_layers(tmp_path):
    """Without refinement every layer takes the logit of the same points, which an exporter may merge."""
    model = tiny(**PLAIN)
    export_model(model, tmp_path / "tiny.onnx", "onnx")
    assert_outputs_match(model, load_exported(tmp_path / "tiny.onnx"), SIZES[:1])


def test_command_line_with_fixed_size_and_gather(tmp_path, capsys):
    """A model without refinement, exported without post-processing."""
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
    assert_outputs_match(model, exported, [(1, 64, 96), (3, 64, 96)])
    image = np.random.default_rng(0).integers(0, 255, (140, 90, 3), np.uint8)  # portrait: fits, with padding
    assert len(exported.predict(image, threshold=0.0)) == 12 * 3
    with pytest.raises(UserError, match=r"65×96 pixels exceed the exported size 64×96"):
        exported(torch.zeros(1, 3, 65, 96))


def test_exported_file_has_a_fixed_precision():
    from deformable_detr.detector import load_detector

    with pytest.raises(UserError, match=r"model\.onnx: an exported file has a fixed precision"):
        load_detector("model.onnx", "cpu", "bf16")


def test_predictions_equal_those_of_the_model_folder(model, file, tmp_path):
    from PIL import Image

    from deformable_detr.cli import main

    model.save_pretrained(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 255, (90, 140, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    results = []
    for source in (tmp_path / "model", file):
        main(["predict", str(source), str(tmp_path / "image.png"), "--threshold", "0", "--device", "cpu",
              "--json", str(tmp_path / "detections.json")])  # fmt: skip
        results.append(json.loads((tmp_path / "detections.json").read_text())[0]["detections"])
    assert len(results[0]) == len(results[1]) == 36
    for first, second in zip(*results, strict=True):
        assert (first["name"], first["category_id"]) == (second["name"], second["category_id"])
        assert first["score"] == pytest.approx(second["score"], abs=1e-4)
        assert first["box"] == pytest.approx(second["box"], abs=0.05)


def test_metrics_equal_those_of_the_model_folder(model, file, tmp_path):
    from deformable_detr.cli import main

    model.save_pretrained(tmp_path / "model")
    root = write_pseudo_labeled_dataset(tmp_path / "set", model)
    metrics = []
    for source in (tmp_path / "model", file):
        main(["evaluate", str(source), str(root), "--device", "cpu", "--workers", "0", "--batch-size", "2",
              "--json", str(tmp_path / "metrics.json")])  # fmt: skip
        metrics.append(json.loads((tmp_path / "metrics.json").read_text()))
    assert metrics[0]["AP"] > 0.1
    for key in ("AP", "AP50", "AR100"):
        assert metrics[1][key] == pytest.approx(metrics[0][key], abs=0.01)


def test_torch_export_and_tampered_export(tmp_path, monkeypatch):
    """A weight that changes between tracing and writing: no file is written, and an existing one is kept."""
    model, options = tiny(), ExportOptions(image_size=(64, 96))
    traced, trace = [], export.trace
    monkeypatch.setattr(export, "trace", lambda *arguments: traced.append(trace(*arguments)) or traced[0])
    path = tmp_path / "model.pt2"
    export_model(model, path, "torch", options)
    exported = load_exported(path)
    assert exported.metadata.image_size == (64, 96)
    assert_outputs_match(model, exported, [(1, 64, 96), (3, 64, 96)])

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
def test_invalid_options_are_reported(model, tmp_path, options, message):
    out, to = tmp_path / options.pop("out"), options.pop("to")
    with pytest.raises(UserError, match=re.escape(message)):
        export_model(model, out, to, ExportOptions(**options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", [False, True])
def test_openvino_weights_do_not_overwrite_another_file(model, tmp_path, folder):
    other = tmp_path / "pytorch_model.bin"
    other.mkdir() if folder else other.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"its weights would replace .*pytorch_model\.bin, another file"):
        export_model(model, tmp_path / "pytorch_model.xml", "openvino")
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


@pytest.mark.parametrize("failing_file", ["a.bin", "a.xml", None])
def test_interrupted_move_never_mixes_two_exports(failing_file, tmp_path, monkeypatch):
    """At any point of the move, the graph and weights that can be opened belong together."""
    new = tmp_path / "new"
    new.mkdir()
    for folder in (tmp_path, new):
        for name in ("a.xml", "a.bin"):
            (folder / name).write_text(folder.name)
    replace = os.replace

    def replace_or_fail(source, target):
        if target == tmp_path / failing_file and source.parent == new and source.name == failing_file:
            raise PermissionError(13, "in use")
        replace(source, target)

    if failing_file:
        monkeypatch.setattr(os, "replace", replace_or_fail)
        with pytest.raises(PermissionError):
            export.move_into_place(new, tmp_path / "a.xml")
    else:
        export.move_into_place(new, tmp_path / "a.xml")
    contents = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    old = dict.fromkeys(("a.xml", "a.bin"), tmp_path.name)
    assert contents == {"a.bin": old, "a.xml": {"a.bin": "new"}, None: dict.fromkeys(old, "new")}[failing_file]


def test_too_large_image_size_is_reported(model, tmp_path):
    with pytest.raises(UserError, match=r"out of memory: choose a smaller --image-size$"):
        export_model(model, tmp_path / "a.pt2", "torch", ExportOptions(image_size=(2**24, 2**24)))
    assert not list(tmp_path.iterdir())


def test_foreign_and_damaged_files_are_reported(tmp_path):
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


@needs_pipes
@pytest.mark.parametrize(("name", "pipe"), [("a.onnx", "a.onnx"), ("a.pt2", "a.pt2"), ("a.xml", "a.bin")])
def test_pipes_are_refused(tmp_path, name, pipe):
    (tmp_path / name).write_bytes(b"nothing")
    replace_by_pipe(tmp_path / pipe)
    with time_limit(), pytest.raises(UserError, match=f"{pipe} cannot be read: not a regular file"):
        load_exported(tmp_path / name)


def test_metadata_round_trip():
    metadata = ExportMetadata(tiny().config, None, "fp32", "gather", False)
    assert ExportMetadata.from_strings(metadata.to_strings(), "file") == metadata


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "openvino", "torch"])
def test_all_formats_at_any_size(kind, tmp_path):
    """Two levels and dynamic sizes; the metadata is read back from each format."""
    pytest.importorskip(kind)
    model = tiny(num_feature_levels=2)
    path = tmp_path / f"tiny{EXPORT_SUFFIXES[kind]}"
    export_model(model, path, kind)
    exported = load_exported(path)
    config = model.export_config()
    assert exported.metadata == ExportMetadata(config, None, "fp32", "grid_sample", False)
    assert_outputs_match(model, exported, SIZES)


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
    # With a spread of 0.15, fp32 and fp64 of the model itself differ by 4e-4.
    model = DeformableDETR(presets.PRESETS[preset](backbone_weights="none", num_classes=4, image_size=320))
    model = randomized(model, spread=0.05)
    path = tmp_path / f"model{EXPORT_SUFFIXES[kind]}"
    export_model(model, path, kind, ExportOptions(sampling=sampling))
    exported = load_exported(path, "cpu")
    for height, width in ((256, 320), (203, 331), (319, 161)):
        for count in (1, 2, 5, 8):
            pixels, mask, expected = example_inputs(model, count, height, width)
            logits, boxes = max_differences(expected, exported(pixels, mask))
            assert logits <= 1e-3, (count, height, width)
            assert boxes <= 1e-4, (count, height, width)
    if kind == "onnx":
        import onnx

        kinds = Counter(node.op_type for node in onnx.load(path).graph.node)
        assert (kinds["GridSample"] == 0) == (sampling == "gather")


def test_onnx_dimensions_have_readable_names(tmp_path):
    import onnx

    export_model(tiny(), tmp_path / "model.onnx", "onnx", ExportOptions(post_processing=True))
    graph = onnx.load(tmp_path / "model.onnx").graph
    dims = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    assert dims == {
        "pixels": ["batch", 3, "height", "width"], "padding_mask": ["batch", "height", "width"],
        "original_sizes": ["batch", 2], "pred_logits": ["batch", "queries", 3], "pred_boxes": ["batch", "queries", 4],
        "boxes": ["batch", "detections", 4], "scores": ["batch", "detections"], "labels": ["batch", "detections"],
    }  # fmt: skip


def test_pt2_reads_narrow_images(tmp_path):
    """A side of 20 pixels is one pixel of the map."""
    model = tiny()
    export_model(model, tmp_path / "model.pt2", "torch")
    exported = load_exported(tmp_path / "model.pt2", "cpu")
    for height, width in ((600, 20), (20, 600), (10, 200)):
        pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
        mask = torch.zeros(2, height, width, dtype=torch.bool)
        mask[1, height // 2 :] = True
        expected, actual = model(pixels, mask), exported(pixels, mask)
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name].detach(), atol=1e-4, rtol=1e-4)


def test_tiles(model, exported):
    image = np.random.default_rng(0).integers(0, 256, (150, 230, 3), dtype=np.uint8)
    expected = model.predict(image, 0.01, tile=96, tile_overlap=0.25)
    detections = load_exported(exported.path).predict(image, 0.01, tile=96, tile_overlap=0.25)
    assert len(detections) == len(expected) > model.config.num_queries
    torch.testing.assert_close(detections.scores, expected.scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(detections.boxes, expected.boxes, atol=0.05, rtol=0)
