"""Explanations of transformers' detectors: the points are those that the attention read, in pixels of the image."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tests.support.browser import browse  # noqa: F401
from tests.support.commands import run_command
from tests.support.server import encode_image, post_image, running_server
from tests.support.transformers_models import CONFIGS, SIZES, pictures, random_network, write_repository

from deformable_detr import UserError, explain, ops
from deformable_detr.adapters.sampling import run_recorded
from deformable_detr.detector import load_detector
from deformable_detr.explanation import trace
from deformable_detr.explanation.html import page

pytest.importorskip("transformers", reason="needs transformers")

SPECIAL = {
    "rt_detr_v2 discrete": CONFIGS["rt_detr_v2"] | {"decoder_method": "discrete"},
    "d_fine discrete": CONFIGS["d_fine odd"] | {"decoder_method": "discrete"},
    "d_fine 1": CONFIGS["d_fine"],  # the layer that predicts; transformers 5.23 builds no such model that runs
    "deimv2 2": CONFIGS["deimv2"] | {"decoder_layers": 3},
}
UNEVEN = [3, 6, 2]  # points per level of "d_fine odd"


def vary_memory(decoder, arguments, inputs):
    """Random tokens: those of a random network are so alike that it does not matter where they are read."""
    memory = inputs["encoder_hidden_states"]
    noise = torch.randn(memory.shape, generator=torch.Generator().manual_seed(4))
    return arguments, {**inputs, "encoder_hidden_states": memory + noise}


@pytest.fixture(scope="module", params=[*CONFIGS, *SPECIAL])
def case(request):
    """A network, pixels (2, 3, H, W), and what its attention layers got and returned without recording."""
    with mock.patch.dict(CONFIGS, SPECIAL):
        network = random_network(request.param)
    if request.param[-1].isdigit() and request.param in SPECIAL:
        network.model.decoder.eval_idx = int(request.param[-1]) - 1
    side = SIZES.get(request.param, SIZES.get(request.param.split()[0], 96))
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    network.model.decoder.register_forward_pre_hook(vary_memory, with_kwargs=True)
    calls = []
    layers = [module for module in network.model.decoder.modules() if hasattr(module, "sampling_offsets")]
    hooks = [
        layer.register_forward_hook(lambda *call: calls.append((call[0], call[2], call[3][0])), with_kwargs=True)
        for layer in layers
    ]
    with torch.no_grad():
        outputs = network(pixel_values=pixels)
    for hook in hooks:
        hook.remove()
    return network, pixels, calls, outputs


def recompute(layer, memory, details, shapes):
    """Sample the values of an attention layer at recorded points: (B, Q, C)."""
    project = getattr(layer, "value_proj", lambda tokens: tokens)
    M = details.weights.shape[2]
    value = project(memory).unflatten(-1, (M, -1)).permute(0, 2, 3, 1)  # (B, M, D, S)
    start, out = 0, torch.zeros(())
    for level, (h, w) in enumerate(shapes):
        level_map = value[..., start : start + h * w].flatten(0, 1).unflatten(-1, (h, w))
        start += h * w
        points = details.locations[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B·M, Q, P, 2)
        weights = details.weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
        out = out + (F.grid_sample(level_map, 2 * points - 1, align_corners=False) * weights).sum(-1)
    out = out.unflatten(0, (-1, M)).flatten(1, 2).transpose(1, 2)
    return getattr(layer, "output_proj", lambda tokens: tokens)(out)


@torch.no_grad()
def test_points_reproduce_each_layer(case):
    network, pixels, calls, _ = case
    outputs = run_recorded(network, pixels, None)
    for (layer, inputs, expected), details in zip(calls, outputs["decoder_attention"], strict=False):
        torch.testing.assert_close(details.weights.sum((-1, -2)), torch.ones_like(details.weights[..., 0, 0]))
        memory, shapes = inputs["encoder_hidden_states"], outputs["spatial_shapes"]
        torch.testing.assert_close(recompute(layer, memory, details, shapes), expected, atol=1e-5, rtol=1e-4)
        for wrong in (details.locations.flip(-1), details.locations + 0.02):
            control = recompute(layer, memory, details._replace(locations=wrong), shapes)
            assert (control - expected).abs().max() > 1e-3, "control: other points give other outputs"


@torch.no_grad()
def test_outputs_are_the_same_and_consistent(case):
    network, pixels, calls, expected = case
    outputs = run_recorded(network, pixels, None)
    assert torch.equal(outputs["pred_logits"], expected.logits)
    assert torch.equal(outputs["pred_boxes"], expected.pred_boxes)
    layers = len(outputs["decoder_attention"])
    eval_idx = getattr(network.model.decoder, "eval_idx", len(calls) - 1)
    assert layers == len(outputs["layer_logits"]) == len(outputs["layer_boxes"]) == eval_idx + 1
    assert torch.equal(outputs["layer_logits"][-1], expected.logits)
    assert torch.equal(outputs["layer_boxes"][-1], expected.pred_boxes)
    references = outputs["decoder_reference_points"]
    for index, ((_, inputs, _), reference) in enumerate(zip(calls, references, strict=False)):
        assert torch.equal(reference, inputs["reference_points"][:, :, 0])
        if index and hasattr(expected, "intermediate_logits"):
            assert torch.equal(reference, outputs["layer_boxes"][index - 1])
    if layers > 1:
        assert not torch.equal(outputs["layer_logits"][0], outputs["layer_logits"][-1])


def test_network_stays_as_it_was(case):
    network, pixels, *_ = case

    def state():
        return [
            (name, module.training, dict(module.__dict__, _parameters=0, _buffers=0, _modules=list(module._modules)))
            for name, module in network.named_modules()
        ]

    before = str(state())
    outputs = run_recorded(network, pixels, None)
    with pytest.raises(Exception, match="channel"):
        run_recorded(network, pixels.repeat(1, 2, 1, 1), None)
    assert str(state()) == before
    outputs["layer_logits"].sum().backward()  # the copy shares the parameters
    assert any(parameter.grad is not None for parameter in network.model.decoder.layers.parameters())
    network.zero_grad()


@torch.no_grad()
def test_threads_and_accelerated(case):
    network, pixels, _, expected = case
    plain = run_recorded(network, pixels, None)

    @torch.no_grad()  # a setting of the thread
    def run(index):
        if index % 2:
            return run_recorded(network, pixels, None)["pred_logits"]
        return network(pixel_values=pixels).logits

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(logits, expected.logits) for logits in pool.map(run, range(8)))
    if getattr(network.config, "decoder_method", "default") == "discrete":
        return
    changed = ops.accelerate(network)
    accelerated = run_recorded(network, pixels, None)
    assert ops.restore(network) == changed
    torch.testing.assert_close(accelerated["pred_logits"], plain["pred_logits"], atol=1e-5, rtol=1e-4)
    for actual, details in zip(accelerated["decoder_attention"], plain["decoder_attention"], strict=True):
        torch.testing.assert_close(actual.locations, details.locations, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    for name in ("d_fine odd", "rt_detr", "lw_detr odd"):
        write_repository(folder / name.split()[0], name)
    pictures()[0].save(folder / "image.png")
    return folder


@pytest.mark.parametrize("name", ["d_fine", "rt_detr", "lw_detr"])
def test_positions_in_pixels(folder, name):
    """The image is stretched; offsets set by hand put all points on the right edge of each reference box."""
    detector = load_detector(folder / name, "cpu")
    layers: list[Any] = [module for module in detector.modules() if hasattr(module, "sampling_offsets")]
    for layer in layers:  # offsets count in half a box, divided by the number of points of the level
        points = getattr(layer, "num_points_list", [layer.n_points] * layer.n_levels)
        counts = torch.tensor([float(count) for count in points for _ in range(count)])
        layer.sampling_offsets.weight.data.zero_()
        bias = torch.stack([counts, torch.zeros_like(counts)], dim=-1)
        layer.sampling_offsets.bias.data.copy_(bias.repeat(layer.n_heads, 1).flatten())
    traced = trace(detector, folder / "image.png", threshold=0.0)
    width, height = Image.open(folder / "image.png").size
    assert width != height
    found = detector.predict(folder / "image.png", threshold=0.0)
    assert torch.equal(traced.detections.boxes, found.boxes)
    for index in range(5):
        explanation = traced.detection(index)
        last = explanation.layers[-1]
        limits = torch.tensor([width, height] * 2)
        clipped = torch.minimum(last.box.clamp(min=0), limits)
        torch.testing.assert_close(clipped, found.boxes[index], atol=1e-3, rtol=1e-4)
        assert last.scores[found.labels[index]].item() == pytest.approx(found.scores[index].item(), abs=1e-6)
        for layer in explanation.layers:
            assert layer.reference_box is not None
            right_edge = torch.stack([layer.reference_box[2], layer.reference_point[1]])
            torch.testing.assert_close(layer.locations, right_edge.expand_as(layer.locations), atol=1e-3, rtol=1e-4)


def test_levels_with_fewer_points(folder):
    explanation = explain(load_detector(folder / "d_fine", "cpu"), folder / "image.png", threshold=0.0)
    for layer in explanation.layers:
        for level, count in enumerate(UNEVEN):
            assert (layer.weights[:, level, :count] > 0).all()
            assert (layer.weights[:, level, count:] == 0).all()
            same = layer.locations[:, level, count - 1 :]
            assert torch.equal(same, same[:, :1].expand_as(same))


def test_point_is_refused(folder):
    with pytest.raises(UserError, match="encoder has no deformable attention, so a point samples nothing"):
        explain(load_detector(folder / "rt_detr", "cpu"), folder / "image.png", point=(3, 4))
    optimized = load_detector(folder / "rt_detr", "cpu", "fp32")
    with pytest.raises(UserError, match="optimized models and exported files have no sampling points"):
        explain(optimized, folder / "image.png")


def test_command(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    for out, start in (("a.png", b"\x89PNG"), ("a.gif", b"GIF8"), ("a.html", b"<!doctype html>")):
        arguments = ("d_fine", "image.png", "--threshold", "0", "--out", out, "--json", "a.json", "--device", "cpu")
        code, text, err = run_command(capsys, "explain", *arguments)
        assert (code, err) == (0, "")
        assert "layer 2: score" in text
        assert (folder / out).read_bytes().startswith(start)
    layers = json.loads((folder / "a.json").read_text())["layers"]
    assert [len(layers), len(layers[0]["weights"]), len(layers[0]["weights"][0])] == [2, 4, 3]
    code, _, err = run_command(capsys, "explain", "d_fine", "image.png", "--point", "3,4", "--device", "cpu")
    assert code == 2
    assert "encoder has no deformable attention" in err


def test_server(folder):
    detector = load_detector(folder / "d_fine", "cpu")
    data = encode_image("PNG", 50, 71)
    with running_server(detector) as client:
        assert client.get("/v1/model").json()["explains"]
        response = post_image(client, data, "/v1/explain?threshold=0&top_k=3")
    assert response.status_code == 200, response.text
    for detection in response.json()["detections"]:
        for layer in detection["layers"]:
            levels = [point[3] for point in layer["points"]]
            assert [levels.count(level) for level in range(3)] == [4 * count for count in UNEVEN]


@pytest.mark.slow
def test_page_in_a_browser(folder, browse, tmp_path):  # noqa: F811
    traced = trace(load_detector(folder / "d_fine", "cpu"), folder / "image.png", threshold=0.0)
    path = tmp_path / "page.html"
    path.write_text(page(traced, traced.detection(0)), encoding="utf-8")
    driver = browse(path)
    script = "return [...document.querySelectorAll('.point')].map(p => [p.dataset.x, p.dataset.y, p.dataset.weight])"
    drawn = torch.tensor([[float(value) for value in row] for row in driver.execute_script(script)])
    assert len(drawn) == 4 * sum(UNEVEN)
    layer = traced.detection(0).layers[-1]
    expected = torch.cat([layer.locations, layer.weights[..., None]], -1).view(-1, 3)
    assert torch.cdist(expected[expected[:, 2] > 0], drawn).min(1).values.max() < 0.1
    assert not driver.get_log("browser")
