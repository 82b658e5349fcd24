"""Figures and animations: points are drawn at their positions, at any image size."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr import Detections, UserError, explain
from deformable_detr.explanation.explanation import DecoderLayerSampling, DetectionExplanation
from tests.support.explanations import random_image, random_model


def by_hand(image, spots, box=(20.0, 15.0, 180.0, 135.0), name="thing", weights=None):
    """One head, one level, one layer per list of spots. Default: equal weights."""
    height, width = image.shape[:2]
    layers = []
    for places in spots:
        locations = torch.tensor(places).view(1, 1, -1, 2)
        even = torch.full((1, 1, len(places)), 1 / len(places))
        heavy = even if weights is None else torch.tensor(weights).view(1, 1, -1)
        reference, found = torch.tensor([100.0, 75.0]), torch.tensor(box)
        layers.append(DecoderLayerSampling(reference, None, found, torch.tensor([0.7]), locations, heavy))
    detections = Detections(
        torch.tensor([box]), torch.tensor([0.7]), torch.tensor([0]), torch.tensor([1]), (name,), (height, width), image
    )
    return DetectionExplanation(image, (height, width), ((8, 8),), tuple(layers), detections, 0, 3)


def centers(mask):
    """Centers (x, y) of the connected parts of a mask, from left to right."""
    from scipy.ndimage import center_of_mass, label

    parts, count = label(mask)
    found = [center_of_mass(parts == n) for n in range(1, count + 1) if (parts == n).sum() > 12]
    return sorted((x, y) for y, x in found)


def close_to(pixels, color, tolerance=24):
    return np.abs(pixels.astype(int) - color).max(-1) <= tolerance


def drawn_at(spot):
    """Position, in pixels of the image, of the sampling point in a figure."""
    image = np.full((150, 200, 3), 90, dtype=np.uint8)
    landmarks = [(30.0, 25.0), (170.0, 125.0)]
    for x, y in landmarks:
        image[int(y) - 3 : int(y) + 3, int(x) - 3 : int(x) + 3] = (255, 0, 0)
    drawn = np.asarray(by_hand(image, [[spot]]).draw(layer=0))
    panel = drawn[:, drawn.shape[1] // 2 :]  # beside the overview, which has no sampling points
    red = centers(close_to(panel, (255, 0, 0), 60))
    assert len(red) == 2
    (ax, ay), (bx, by) = red
    top = int(min(ay, by)) - 60
    between = panel[top : int(max(ay, by)) + 60]
    yellow = centers(close_to(between, (253, 231, 37)))  # the end of the colors: the largest weight
    assert len(yellow) == 1
    x, y = yellow[0][0], yellow[0][1] + top
    scale_x = (landmarks[1][0] - landmarks[0][0]) / (bx - ax)
    scale_y = (landmarks[1][1] - landmarks[0][1]) / (by - ay)
    assert scale_x == pytest.approx(scale_y, rel=0.02)
    return landmarks[0][0] + (x - ax) * scale_x, landmarks[0][1] + (y - ay) * scale_y


@pytest.mark.parametrize("spot", [(60.5, 100.25), (150.0, 30.0), (120.75, 52.0)])
def test_points_are_drawn_at_their_locations(spot):
    assert drawn_at(spot) == pytest.approx(spot, abs=0.25)


def test_a_shift_of_half_a_pixel_is_detected():
    for shifted in ((61.0, 100.25), (60.5, 99.75)):
        assert drawn_at(shifted) != pytest.approx((60.5, 100.25), abs=0.25)


def test_names_are_not_formulas_and_have_fallbacks(caplog):
    """A dollar sign would start a formula; a letter without a font would be drawn as an empty box."""
    image = np.full((150, 200, 3), 90, dtype=np.uint8)
    plain = np.asarray(by_hand(image, [[(60.0, 70.0)]], name="class 1").draw())
    for name in ("$\\frac{1$", "10 $ and 20 $"):
        assert (np.asarray(by_hand(image, [[(60.0, 70.0)]], name=name).draw()) != plain).any()
    assert not caplog.records
    unknown = np.asarray(by_hand(image, [[(60.0, 70.0)]], name="\U0010fffd").draw())
    assert (unknown == plain).all()
    assert "class 1" in caplog.text


def test_a_gif_keeps_the_colors_of_the_weights(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    found = by_hand(noise, [[(60.0, 70.0), (90.0, 30.0)]], weights=[0.7, 0.3])
    path = found.save(tmp_path / "a.gif")
    wanted, [shown] = np.asarray(found.draw(layer=0)), [np.asarray(Image.open(path).convert("RGB"))]
    for color in ((253, 231, 37), (230, 159, 0)):  # the largest weight's, the box's
        there = close_to(wanted, color, 2)
        assert there.sum() > 100
        assert np.median(np.abs(shown[there].astype(int) - color)) <= 2


def test_the_viewport_contains_the_box_and_most_attention():
    image = np.zeros((400, 600, 3), dtype=np.uint8)
    found = by_hand(image, [[(300.0, 200.0), (290.0, 210.0), (5000.0, 5000.0)]], (280.0, 190.0, 320.0, 230.0),
                    weights=[0.5, 0.495, 0.005])  # fmt: skip
    view = found.viewport()
    assert view.x1 < 280
    assert view.y1 < 190
    assert view.x2 > 320
    assert view.y2 > 230
    assert view.width < 120  # one far point of no weight changes nothing
    assert view.width / view.height == pytest.approx(1.5)
    inside = view.clamp(np.array([[5000.0, 5000.0], [300.0, 200.0]]))
    assert view.contains(inside).all()
    assert inside[1].tolist() == [300, 200]


@pytest.mark.parametrize("size", [(13, 20), (64, 64), (40, 900), (900, 40), (2000, 3000)])
def test_figure_size(size):
    model = random_model(two_stage=True, refine=True)
    found = explain(model, random_image(*size), threshold=0.0)
    drawn = found.draw()
    assert drawn.mode == "RGB"
    assert 600 <= max(drawn.size) <= 3000
    assert min(drawn.size) >= 300


def test_one_encoder_layer_has_a_panel_per_token():
    found = explain(random_model(encoder_layers=1), random_image(67, 101), point=(30, 30))
    every, one = found.draw(), found.draw(layer=0)
    assert one.height > 1.3 * every.height


def test_a_gif_has_a_frame_per_layer(tmp_path):
    image = np.full((150, 200, 3), 90, dtype=np.uint8)
    path = by_hand(image, [[(50.0, 50.0)], [(90.0, 90.0)], [(120.0, 60.0)]]).save(tmp_path / "moving.gif")
    with Image.open(path) as moving:
        assert moving.format == "GIF"
        assert moving.n_frames == 3
        shown = []
        for number in range(3):
            moving.seek(number)
            shown.append(np.asarray(moving.convert("RGB")).copy())
    assert all((a != b).any() for a, b in itertools.pairwise(shown))


@pytest.mark.parametrize("ending", [".png", ".jpg", ".WEBP"])
def test_image_formats(tmp_path, ending):
    image = np.full((150, 200, 3), 90, dtype=np.uint8)
    path = by_hand(image, [[(50.0, 50.0)]], name="a very long class name " * 20).save(tmp_path / f"still{ending}", 0)
    with Image.open(path) as still:
        assert getattr(still, "n_frames", 1) == 1
        assert still.width < 2000


def test_errors(tmp_path):
    found = by_hand(np.zeros((150, 200, 3), dtype=np.uint8), [[(50.0, 50.0)]])
    with pytest.raises(UserError, match="no layer 2: the decoder has 1"):
        found.draw(layer=1)
    with pytest.raises(UserError, match="no layer 0"):
        found.draw(layer=-1)
    with pytest.raises(UserError, match=r"'\.xyz' is not an image format"):
        found.save(tmp_path / "a.xyz")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        found.save(tmp_path / "file" / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_attention_inside_box():
    image, spots = np.zeros((150, 200, 3), dtype=np.uint8), [(1.0, 1.0), (5.0, 5.0), (10.0, 0.0), (11.0, 2.0)]
    found = by_hand(image, [spots], weights=[0.1, 0.4, 0.2, 0.3])
    for box, share in [((0, 0, 10, 4), 0.3), ((0, 0, 99, 99), 1.0), ((2, 2, 4, 4), 0.0)]:
        assert found.attention_inside_box(torch.tensor(box)).tolist() == pytest.approx([share])
