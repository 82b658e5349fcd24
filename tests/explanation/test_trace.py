"""Sampling points in pixels compared with the tensors and with hand-set offsets, for several image shapes."""

import sys

import pytest
import torch
from PIL import Image

from deformable_detr import UserError, explain
from deformable_detr.explanation import DetectionExplanation, trace
from deformable_detr.ops.reference import sample_and_sum
from tests.support.explanations import (
    HEADS,
    LEVELS,
    POINTS,
    random_image,
    random_model,
    random_sampling,
    set_sampling,
    trace_on_canvas,
)

SIZES = [(67, 101), (101, 67), (64, 64), (13, 47)]  # (height, width)
CANVAS = (200, 208)


def model_with_known_points(**changes):
    """Return a model with references at (0.3, 0.6), and the offsets and logits of its two decoder layers."""
    model = random_model(**changes)
    sampling = [random_sampling(1), random_sampling(2)]
    with torch.no_grad():
        model.reference_points.weight.zero_()
        model.reference_points.bias.copy_(torch.logit(torch.tensor([0.3, 0.6])))
    for layer, (offsets, logits) in zip(model.decoder.layers, sampling, strict=True):
        set_sampling(layer.cross_attn, offsets, logits)
    return model, sampling


@pytest.mark.parametrize("size", SIZES)
def test_known_offsets_follow_equation_3(size):
    model, sampling = model_with_known_points()
    height, width = size
    explanation = explain(model, random_image(*size), threshold=0.0)
    for layer, (offsets, logits) in zip(explanation.layers, sampling, strict=True):
        assert layer.locations.shape == (HEADS, LEVELS, POINTS, 2)
        assert layer.reference_box is None
        torch.testing.assert_close(layer.reference_point, torch.tensor([0.3 * width, 0.6 * height]))
        for level, (h, w) in enumerate(explanation.spatial_shapes):
            # An offset of 1 is one pixel of the level's feature map.
            expected = torch.tensor([0.3, 0.6]) + offsets[:, level] / torch.tensor([w, h])
            expected = expected * torch.tensor([width, height])
            torch.testing.assert_close(layer.locations[:, level], expected, atol=1e-3, rtol=1e-5)
        weights = logits.flatten(1).softmax(1).view_as(logits)
        torch.testing.assert_close(layer.weights, weights)


def test_offsets_scale_with_the_reference_box():
    model, sampling = model_with_known_points(refine=True)
    explanation = explain(model, random_image(67, 101), threshold=0.0)
    first, second = explanation.layers
    assert first.reference_box is None
    torch.testing.assert_close(second.reference_box, first.box)  # each layer starts from the previous box
    x1, y1, x2, y2 = first.box.tolist()
    center, half = torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2]), torch.tensor([(x2 - x1) / 2, (y2 - y1) / 2])
    torch.testing.assert_close(second.reference_point, center)
    expected = center + sampling[1][0] / POINTS * half
    torch.testing.assert_close(second.locations, expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("canvas", [None, CANVAS])
def test_sampling_a_coordinate_map_gives_the_locations(size, canvas):
    """Independent of `canvas_to_pixels`: the op samples pixel coordinates at its own locations."""
    model = random_model(two_stage=True, refine=True)
    height, width = size
    traced = trace_on_canvas(model, random_image(*size), canvas, threshold=0.0)
    shapes = traced.detection(0).spatial_shapes
    if canvas:
        assert traced.valid_ratios.min() < 0.7
    values = []
    for (h, w), (ratio_x, ratio_y) in zip(shapes, traced.valid_ratios.tolist(), strict=True):
        x = (torch.arange(w) + 0.5) / (ratio_x * w) * width  # in image pixels, continued into the padding
        y = (torch.arange(h) + 0.5) / (ratio_y * h) * height
        values.append(torch.stack((x.expand(h, w), y[:, None].expand(h, w)), -1).flatten(0, 1))
    value = torch.cat(values)[None, :, None]  # (1, S, one head, 2)
    sides = torch.tensor([(w, h) for h, w in shapes])
    checked = 0
    for details, layer in [
        *zip(traced.outputs["decoder_attention"], traced.detection(0).layers, strict=True),
        *zip(traced.outputs["encoder_attention"], traced.point(width / 2, height / 3).layers, strict=True),
    ]:
        query = [traced.detection(0).query] if layer.weights.ndim == 3 else traced.point(width / 2, height / 3).tokens
        raw = details.locations[0, query]  # (T, M, L, P, 2)
        drawn = layer.locations.view(raw.shape)
        inner = ((raw * sides[:, None] >= 0.5) & (raw * sides[:, None] <= sides[:, None] - 0.5)).all(-1)
        for level in range(LEVELS):
            level_locations = raw[:, :, level].reshape(1, -1, 1, 1, 1, 2)
            all_levels = torch.zeros(1, level_locations.shape[1], 1, LEVELS, 1, 2).index_copy_(
                3, torch.tensor([level]), level_locations
            )
            level_weights = torch.zeros(1, level_locations.shape[1], 1, LEVELS, 1).index_fill_(
                3, torch.tensor([level]), 1.0
            )
            sampled = sample_and_sum(value, shapes, all_levels, level_weights)[0]
            mask = inner[:, :, level].reshape(-1)
            torch.testing.assert_close(sampled[mask], drawn[:, :, level].reshape(-1, 2)[mask], atol=2e-2, rtol=1e-4)
            checked += int(mask.sum())
    assert checked > 20


@pytest.mark.parametrize("shift", [0.5, 4.0])  # pixels; half a cell of the finest feature map
def test_shifted_locations_are_detected(monkeypatch, shift):
    module = sys.modules["deformable_detr.explanation.trace"]
    original = module.canvas_to_pixels
    monkeypatch.setattr(module, "canvas_to_pixels", lambda *arguments: original(*arguments) + shift)
    with pytest.raises(AssertionError, match="not close"):
        test_known_offsets_follow_equation_3((67, 101))
    with pytest.raises(AssertionError, match="not close"):
        test_sampling_a_coordinate_map_gives_the_locations((67, 101), None)


@pytest.mark.parametrize("canvas", [None, CANVAS])
def test_encoder_without_offsets_samples_the_token_of_the_point(canvas):
    model = random_model()
    for layer in model.encoder.layers:
        set_sampling(layer.self_attn, torch.zeros(HEADS, LEVELS, POINTS, 2), torch.zeros(HEADS, LEVELS, POINTS))
    height, width = 67, 101
    traced = trace_on_canvas(model, random_image(height, width), canvas)
    for x, y in [(0, 0), (50.2, 31.9), (100.9, 66.9), (width, height)]:
        explanation = traced.point(x, y)
        for token, (ratio_x, ratio_y), (h, w) in zip(
            range(LEVELS), traced.valid_ratios.tolist(), explanation.spatial_shapes, strict=True
        ):
            cell = torch.tensor([width / (ratio_x * w), height / (ratio_y * h)])  # size of a token in image pixels
            assert ((explanation.token_centers[token] - torch.tensor([x, y])).abs() <= cell / 2 + 1e-3).all()
            for layer in explanation.layers:
                expected = explanation.token_centers[token].expand(HEADS, LEVELS, POINTS, 2)
                torch.testing.assert_close(layer.locations[token], expected, atol=1e-3, rtol=1e-5)
    assert traced.point(0, 0).tokens[0] == 0


def test_exif_orientation(tmp_path):
    model = random_model(two_stage=True, refine=True)
    upright = random_image(67, 101).permute(1, 2, 0).numpy()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° clockwise
    Image.fromarray(upright).rotate(90, expand=True).save(tmp_path / "side.png", exif=exif)
    rotated, straight = explain(model, tmp_path / "side.png", threshold=0.0), explain(model, upright, threshold=0.0)
    assert rotated.image_size == (67, 101)
    assert torch.equal(rotated.layers[-1].locations, straight.layers[-1].locations)
    assert torch.equal(rotated.layers[-1].box, straight.layers[-1].box)
    explanation = explain(model, tmp_path / "side.png", point=(100, 10))
    assert explanation.token_centers[:, 0].max() > 67  # beyond the stored width


def test_detections_equal_predict_and_the_last_layer():
    model = random_model(two_stage=True, refine=True)
    image = random_image(67, 101)
    predicted = model.predict(image, threshold=0.008, top_k=8)
    traced = trace(model, image, threshold=0.008, top_k=8)
    assert len(predicted) > 3
    assert torch.equal(traced.detections.boxes, predicted.boxes)
    assert torch.equal(traced.detections.scores, predicted.scores)
    assert traced.detections.names == predicted.names
    limits = torch.tensor([101.0, 67.0, 101.0, 67.0])
    for number in range(len(predicted)):
        explanation = traced.detection(number)
        last = explanation.layers[-1]
        assert last.scores[explanation.label].item() == pytest.approx(explanation.score, abs=1e-6)
        torch.testing.assert_close(last.box.clamp(min=torch.zeros(4), max=limits), predicted.boxes[number])


def test_model_keeps_its_mode():
    model = random_model().train()
    explain(model, random_image(64, 64), threshold=0.0)
    assert model.training


def test_attention_inside_box():
    model, _ = model_with_known_points()
    explanation = explain(model, random_image(67, 101), threshold=0.0)
    box = torch.tensor([0.0, 0.0, 33.0, 67.0])
    for share, layer in zip(explanation.attention_inside_box(box).tolist(), explanation.layers, strict=True):
        x, y = layer.locations.unbind(-1)
        inside = (x >= 0) & (x <= 33) & (y >= 0) & (y <= 67)
        assert 0 < share < 1
        assert share == pytest.approx(layer.weights[inside].sum().item() / HEADS)


def test_to_dict():
    model = random_model(refine=True)
    explanation = explain(model, random_image(67, 101), 1, threshold=0.0)
    assert isinstance(explanation, DetectionExplanation)
    document = explanation.to_dict()
    assert document["detection"]["number"] == 2
    assert document["detection"]["name"] == explanation.name
    assert document["layers"][0]["reference_box"] is None
    assert torch.equal(torch.tensor(document["layers"][1]["locations"]), explanation.layers[1].locations)
    assert document["layers"][1]["share_inside_box"] == explanation.attention_inside_box()[1].item()
    point = explain(model, random_image(67, 101), point=(10, 20)).to_dict()
    assert point["point"] == [10, 20]
    assert torch.tensor(point["layers"][1]["weights"]).shape == (LEVELS, HEADS, LEVELS, POINTS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"detection": 99, "threshold": 0.0}, ["no detection 100", "18"]),
        ({"detection": -1, "threshold": 0.0}, ["no detection 0"]),
        ({"threshold": 0.9}, ["0 have a score of 0.9", "the best score is 0.0"]),
        ({"threshold": 1.5}, ["threshold 1.5"]),
        ({"top_k": 0}, ["top_k 0"]),
        ({"point": (102, 5)}, ["102,5", "101 × 67"]),
        ({"point": (5, -1)}, ["5,-1", "outside"]),
        ({"point": (float("nan"), 1)}, ["outside"]),
        ({"point": (5, 5), "detection": 0}, ["not both"]),
    ],
)
def test_errors(options, words):
    with pytest.raises(UserError) as error:
        explain(random_model(), random_image(67, 101), **options)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_model_without_encoder_layers():
    model = random_model(encoder_layers=0)
    with pytest.raises(UserError, match="encoder has no deformable attention"):
        explain(model, random_image(67, 101), point=(5, 5))
    assert len(explain(model, random_image(67, 101), threshold=0.0).layers) == 2
