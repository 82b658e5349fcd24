"""transformers' detectors as exported files: equal detections, metadata, refusals."""

import json

import pytest
import torch

from deformable_detr.adapters.detector import TransformersDetector
from deformable_detr.cli import main
from deformable_detr.config.detector import AdapterConfig
from deformable_detr.config.image_size import FixedSize
from deformable_detr.detector import load_detector, load_model
from deformable_detr.export import ExportOptions, export, export_model
from deformable_detr.utils.errors import UserError
from deformable_detr.utils.files import EXPORT_SUFFIXES
from tests.support.transformers_models import CONFIGS, NAMES, pictures, write_repository

pytest.importorskip("transformers", reason="needs transformers")
for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


def assert_equal_detections(model, file):
    """Batches of one and of three images of different sizes."""
    exported = load_detector(file, "cpu")
    assert isinstance(exported.config, AdapterConfig)
    assert exported.config == model.config
    assert exported.resize_rule == model.resize_rule
    for batch_size in (1, 3):
        expected = model.predict(pictures(), 0.0, 1000, batch_size)
        for one, other in zip(expected, exported.predict(pictures(), 0.0, 1000, batch_size), strict=True):
            torch.testing.assert_close(other.scores, one.scores, rtol=0, atol=1e-4)
            for label, score, box in zip(one.labels, one.scores, one.boxes, strict=True):  # in any order of near ties
                near = (other.labels == label) & ((other.scores - score).abs() < 1e-4)
                assert ((other.boxes - box).abs().amax(1) < 0.05)[near].any()


def saved(folder, name):
    write_repository(folder, name)
    return load_model(folder)


@pytest.fixture(scope="module")
def lw_detr(tmp_path_factory):
    """A repository that tests of this module share."""
    folder = tmp_path_factory.mktemp("lw_detr")
    write_repository(folder, "lw_detr")
    return folder


@pytest.fixture(scope="module")
def cache():
    return {}


@pytest.fixture
def traced(cache, monkeypatch):
    """Let exports of `lw_detr` trace and convert it once."""
    trace, convert = export.trace, export.convert_to_onnx

    def traced_once(*arguments):
        if "program" not in cache:
            cache["program"] = trace(*arguments)
        return cache["program"]

    def converted_once(program, metadata):
        if "graph" not in cache:
            cache["graph"] = convert(program, metadata)
        return cache["graph"]

    monkeypatch.setattr(export, "trace", traced_once)
    monkeypatch.setattr(export, "convert_to_onnx", converted_once)


@pytest.mark.parametrize("to", ["onnx", "openvino", "torch"])
def test_formats(to, lw_detr, traced, tmp_path):
    if to == "openvino":
        pytest.importorskip(to)
    file = tmp_path / f"model{EXPORT_SUFFIXES[to]}"
    assert not main(["export", str(lw_detr), "--to", to, "--out", str(file)])
    assert_equal_detections(load_model(lw_detr), file)
    exported = load_detector(file, "cpu")
    assert exported.config.class_names == NAMES
    assert exported.canvas == (128, 128)


@pytest.mark.parametrize("problem", ["the exported file differs from the model", "the file cannot be verified"])
def test_refused_export_leaves_nothing_behind(problem, lw_detr, traced, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "TOLERANCES", {"fp32": (-1.0, -1.0)})
    if "cannot" in problem:  # all proposals have the same score
        monkeypatch.setattr(TransformersDetector, "proposal_scores", lambda *_: torch.zeros(1, 64))
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(lw_detr), "--to", "onnx", "--out", str(tmp_path / "model.onnx")])
    error = capsys.readouterr().err
    assert error.startswith(f"error: refused: {problem}, batch 1 of 128×128: logits ")
    assert ("have equal scores" in error) == ("cannot" in problem)
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_impossible_options(lw_detr, tmp_path):
    model = load_model(lw_detr)
    assert model.resize_rule == FixedSize(128, 128)
    out = tmp_path / "model.onnx"
    with pytest.raises(UserError, match=r"^--image-size 96,96: the model takes 128,128$"):
        export_model(model, out, "onnx", ExportOptions(image_size=(96, 96)))
    with pytest.raises(UserError, match=r"^--precision int8: not supported for this model"):
        export_model(model, out, "onnx", ExportOptions("int8", data=tmp_path))
    with pytest.raises(UserError, match=r"^only a model can be exported"):
        export_model(model.optimize(), out, "onnx")
    processor = lw_detr / "preprocessor_config.json"
    text = processor.read_text()
    try:
        processor.write_text(json.dumps({**json.loads(text), "size": {"shortest_edge": 128, "longest_edge": 256}}))
        keeps_ratio = load_model(lw_detr)
    finally:
        processor.write_text(text)
    for size, given in ((None, "dynamic"), ((128, 100), "128,100")):
        with pytest.raises(UserError, match=rf"^--image-size {given}: this model needs H,W in multiples of \d+$"):
            export_model(keeps_ratio, out, "onnx", ExportOptions(image_size=size))
    assert not list(tmp_path.iterdir())


def test_batch_size_is_dynamic_in_code_that_asks_for_it(tmp_path):
    """RT-DETR takes it by `len(tensor)`, and its relatives check values of tensors."""
    model = saved(tmp_path / "model", "rt_detr_v2")
    export_model(model, tmp_path / "model.onnx", "onnx")
    assert_equal_detections(model, tmp_path / "model.onnx")


@pytest.mark.slow
# The others are in tests/adapters/test_end_to_end.py.
@pytest.mark.parametrize("name", [name for name in CONFIGS if name.endswith(" odd")])
@pytest.mark.parametrize("to", ["onnx", "openvino", "torch"])
def test_every_family(name, to, tmp_path):
    if to == "openvino":
        pytest.importorskip(to)
    model = saved(tmp_path / "model", name)
    file = tmp_path / f"model{EXPORT_SUFFIXES[to]}"
    size = None if isinstance(model.resize_rule, FixedSize) else (160, 160)
    export_model(model, file, to, ExportOptions(image_size=size, post_processing=to == "onnx"))
    if size is None:
        assert_equal_detections(model, file)
    else:  # the file pads images, which changes what the backbone reads; the export compared it with the padded model
        assert len(load_detector(file, "cpu").predict(pictures(), 0.0, 5, batch_size=3)) == 3


@pytest.mark.slow
def test_gather_and_aspect_ratio(tmp_path):
    """No GridSample in the graph; images of any aspect ratio are padded to the size of the file."""
    import onnx

    write_repository(tmp_path / "model", "rf_detr")
    processor = tmp_path / "model/preprocessor_config.json"
    size = {"size": {"shortest_edge": 64, "longest_edge": 128}}
    processor.write_text(json.dumps({**json.loads(processor.read_text()), **size}))
    model = load_model(tmp_path / "model")
    file = tmp_path / "model.onnx"
    export_model(model, file, "onnx", ExportOptions(image_size=(64, 128), sampling="gather"))
    assert "GridSample" not in {node.op_type for node in onnx.load(file).graph.node}
    assert len(load_detector(file, "cpu").predict(pictures(), 0.0, 5, batch_size=3)) == 3
