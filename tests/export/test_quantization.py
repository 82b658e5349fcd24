"""int8: calibrated on the training split, limited to robust modules, rejected if AP drops too much."""

import json
import logging
import re
import sys

import numpy as np
import onnx
import pytest
import torch

from deformable_detr import DeformableDETR
from deformable_detr.cli import main
from deformable_detr.export import ExportOptions, export, export_model, load_exported, quantization
from deformable_detr.export.graph import INPUTS
from deformable_detr.export.quantization import CalibrationImages, quantize
from deformable_detr.runtimes.metadata import ExportMetadata
from deformable_detr.utils.errors import UserError
from deformable_detr.utils.files import EXPORT_SUFFIXES

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def metadata(model, image_size=None, post_processing=False):
    config = model.export_config()
    return ExportMetadata(config, image_size, "int8", "grid_sample", post_processing)


@pytest.mark.parametrize("module", [
    "backbone.body.layer2.0.conv1", "backbone.body.blocks.1.0.conv_pw", "projections.levels.0.0",
    "encoder.layers.0.ffn.linear1", "encoder.layers.11.self_attn.value_proj", "encoder.layers.0.self_attn.output_proj",
])  # fmt: skip
def test_parts_in_int8(module):
    assert DeformableDETR.int8_modules["backbone and encoder"].match(module)
    assert bool(DeformableDETR.int8_modules["encoder"].match(module)) == module.startswith("encoder")


@pytest.mark.parametrize("module", [
    "backbone.body.conv_stem", "backbone.body.blocks.0.0.conv_dw", "backbone.body.layer1.0.conv1",
    "decoder.heads.classes.0", "decoder.heads.boxes.0.layers.0", "encoder.layers.0.self_attn.sampling_offsets",
    "encoder.layers.0.self_attn.attention_weights", "decoder.layers.0.self_attn", "encoder.layers.0.norm1",
    "decoder.position_head.layers.0", "proposals", "",
])  # fmt: skip
def test_parts_in_fp32(module):
    assert not any(parts.match(module) for parts in DeformableDETR.int8_modules.values())


def test_calibration_images(model, data, monkeypatch):
    """Spread over the training split, preprocessed like model inputs, and iterable repeatedly."""
    images = CalibrationImages(metadata(model), data)
    assert len(images) == len(list(images)) == len(list(images)) == 6
    inputs_seen = []
    with model.register_forward_pre_hook(lambda _, inputs: inputs_seen.append(inputs[0].clone())):
        model.predict(data / "train" / "1.png")
    torch.testing.assert_close(next(iter(images))[0], inputs_seen[0])
    pixels, mask = next(iter(CalibrationImages(metadata(model, (128, 160)), data)))
    assert pixels.shape == (1, 3, 128, 160)
    assert mask.any()
    assert (pixels.permute(0, 2, 3, 1)[mask] == 0).all()
    monkeypatch.setattr(quantization, "MAX_IMAGES", 2)
    limited = list(CalibrationImages(metadata(model), data))
    assert [pixels.shape for pixels, _ in limited] == [list(images)[index][0].shape for index in (0, 3)]


def test_invalid_options_are_reported(model, data, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="not supported for torch; use --to onnx or --to openvino"):
        export_model(model, tmp_path / "a.pt2", "torch", ExportOptions("int8", data=data))
    with pytest.raises(UserError, match="needs --data"):
        export_model(model, tmp_path / "a.onnx", "onnx", ExportOptions("int8"))
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(UserError, match=re.escape("nncf is not installed: pip install 'deformable-detr[export]'")):
        export_model(model, tmp_path / "a.onnx", "onnx", ExportOptions("int8", data=data))
    assert not list(tmp_path.iterdir())


def test_ap_is_measured_if_data_is_given(exported):
    before, after = exported.result.ap_before, exported.result.ap_after
    assert after == pytest.approx(before, abs=1e-6)
    assert f"AP {before:.4f} before, {after:.4f} after" in exported.lines


@pytest.mark.parametrize(("limit", "rejected"), [(0.005, True), (1.0, False)])
def test_quantization_that_lowers_ap_is_rejected(model, data, converted, tmp_path, monkeypatch, limit, rejected):
    """A faulty quantizer of the class heads: only the limit on the AP loss rejects its file."""

    def faulty_quantize(proto, images, modules, per_channel):
        for weight in proto.graph.initializer:
            if "classes" in weight.name and weight.name.endswith("bias"):
                values = onnx.numpy_helper.to_array(weight)
                changed = np.linspace(9, -9, values.size, dtype=values.dtype)
                weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
        return proto

    monkeypatch.setattr(export, "import_nncf", lambda: None)
    monkeypatch.setattr(export, "quantize", faulty_quantize)
    monkeypatch.setattr(export, "MAX_AP_LOSS", limit)
    path, lines = tmp_path / "model.onnx", []
    options = ExportOptions("int8", post_processing=True, data=data)
    if rejected:
        with pytest.raises(UserError, match=r"refused: int8 lowers AP from 0\.\d+ to 0\.\d+, .* nothing was written"):
            export_model(model, path, "onnx", options, lines.append)
        assert not list(tmp_path.iterdir())
    else:
        _, _, before, after = export_model(model, path, "onnx", options, lines.append)
        assert after < before - 0.005
        assert path.exists()
    # If one choice of modules costs too much AP, the next is tried.
    assert sum(line.startswith("AP ") for line in lines) == (len(DeformableDETR.int8_modules) if rejected else 1)


@pytest.mark.parametrize("per_channel", [False, True])
def test_depthwise_convolutions_run(per_channel, caplog):
    """ONNX Runtime fuses a depthwise convolution with its neighbors, which needs one range per tensor."""
    pytest.importorskip("nncf")
    import onnxruntime

    torch.manual_seed(0)
    depthwise = torch.nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
    torch.nn.init.constant_(depthwise.weight, 0.1)
    layers = [torch.nn.Conv2d(3, 16, 1), torch.nn.ReLU6(), depthwise, torch.nn.ReLU6(), torch.nn.Conv2d(16, 4, 1)]
    module = torch.nn.Sequential(*layers).eval()
    pixels = torch.rand(1, 3, 24, 24)
    program = torch.onnx.export(module, (pixels,), input_names=[INPUTS[0]], dynamo=True, verbose=False)
    images = [(pixels, torch.zeros(1, 24, 24, dtype=torch.bool))] * 3
    proto = quantize(program.model_proto, images, re.compile(""), per_channel)
    assert sum(node.op_type == "DequantizeLinear" for node in proto.graph.node) > 3
    logging.getLogger("deformable_detr").warning("logging still works")
    assert "logging still works" in caplog.text
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    if per_channel:
        with pytest.raises(Exception, match="zero point"):
            session.run(None, {INPUTS[0]: pixels.numpy()})
    else:
        actual = torch.from_numpy(session.run(None, {INPUTS[0]: pixels.numpy()})[0])
        expected = module(pixels)
        assert (actual - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_quantized_export_end_to_end(model, data, tmp_path, monkeypatch, capsys, kind):
    """Without a limit on the AP loss, because random weights do not tolerate int8."""
    pytest.importorskip("nncf")
    pytest.importorskip(kind)
    monkeypatch.setattr(export, "MAX_AP_LOSS", 1.0)
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / f"tiny{EXPORT_SUFFIXES[kind]}"
    main(["export", str(tmp_path / "model"), "--to", kind, "--out", str(path), "--precision", "int8",
          "--data", str(data), "--post-processing"])  # fmt: skip
    out = capsys.readouterr().out
    assert "calibrating on 6 training images" in out
    assert re.search(r"AP \d\.\d+ before, \d\.\d+ after", out)
    assert load_exported(path).metadata == metadata(model, post_processing=True)
    if kind == "onnx":
        assert sum(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node) > 5
    main(["evaluate", str(path), str(data), "--device", "cpu", "--workers", "0", "--json", str(tmp_path / "f.json")])
    assert json.loads((tmp_path / "f.json").read_text())["AP"] > 0.02
    main(["predict", str(path), str(data / "valid" / "1.png"), "--threshold", "0", "--json", str(tmp_path / "p.json")])
    assert json.loads((tmp_path / "p.json").read_text())[0]["detections"]
