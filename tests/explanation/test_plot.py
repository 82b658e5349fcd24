"""Figures and animations: points are drawn at their positions at any image size."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr import Detections, UserError, explain
from deformable_detr.explanation.explanation import DecoderLayerSampling, DetectionExplanation
from deformable_detr.visualize.draw import NOTEBOOK_SIDE
from tests.support.explanations import random_image, random_model


def make_explanation(image, points_per_layer, box=(20.0, 15.0, 180.0, 135.0), name="thing", weights=None):
    """Return an explanation with one head, one level and one layer per list of points; equal weights by default."""
    height, width = image.shape[:2]
    layers = []
    for points in points_per_layer:
        locations = torch.tensor(points).view(1, 1, -1, 2)
        equal_weights = torch.full((1, 1, len(points)), 1 / len(points))
        layer_weights = equal_weights if weights is None else torch.tensor(weights).view(1, 1, -1)
        reference, layer_box = torch.tensor([100.0, 75.0]), torch.tensor(box)
        layers.append(DecoderLayerSampling(reference, None, layer_box, torch.tensor([0.7]), locations, layer_weights))
    detections = Detections(
        torch.tensor([box]), torch.tensor([0.7]), torch.tensor([0]), torch.tensor([1]), (name,), (height, width), image
    )
    return DetectionExplanation(image, (height, width), ((8, 8),), tuple(layers), detections, 0, 3)


def centers(mask):
    """Return the centers (x, y) of the connected components of a mask, from left to right."""
    from scipy.ndimage import center_of_mass, label

    components, count = label(mask)
    positions = [center_of_mass(components == n) for n in range(1, count + 1) if (components == n).sum() > 12]
    return sorted((x, y) for y, x in positions)


def close_to(pixels, color, tolerance=24):
    return np.abs(pixels.astype(int) - color).max(-1) <= tolerance


def drawn_position(point):
    """Return the position of the drawn sampling point in pixels of the image."""
    image = np.full((150, 200, 3), 90, dtype=np.uint8)
    landmarks = [(30.0, 25.0), (170.0, 125.0)]
    for x, y in landmarks:
        image[int(y) - 3 : int(y) + 3, int(x) - 3 : int(x) + 3] = (255, 0, 0)
    drawn = np.asarray(make_explanation(image, [[point]]).draw(layer=0))
    panel = drawn[:, drawn.shape[1] // 2 :]  # right of the overview, which has no sampling points
    red = centers(close_to(panel, (255, 0, 0), 60))
    assert len(red) == 2
    (ax, ay), (bx, by) = red
    top = int(min(ay, by)) - 60
    between = panel[top : int(max(ay, by)) + 60]
    yellow = centers(close_to(between, (253, 231, 37)))  # the color of the largest weight
    assert len(yellow) == 1
    x, y = yellow[0][0], yellow[0][1] + top
    scale_x = (landmarks[1][0] - landmarks[0][0]) / (bx - ax)
    scale_y = (landmarks[1][1] - landmarks[0][1]) / (by - ay)
    assert scale_x == pytest.approx(scale_y, rel=0.02)
    return landmarks[0][0] + (x - ax) * scale_x, landmarks[0][1] + (y - ay) * scale_y


@pytest.mark.parametrize("point", [(60.5, 100.25), (150.0, 30.0), (120.75, 52.0)])
def test_points_are_drawn_at_their_locations(point):
    assert drawn_position(point) == pytest.approx(point, abs=0.25)


def test_half_pixel_shift_is_detected():
    for shifted in ((61.0, 100.25), (60.5, 99.75)):
        assert drawn_position(shifted) != pytest.approx((60.5, 100.25), abs=0.25)


def test_names_are_not_parsed_as_formulas_and_have_fallbacks(caplog):
    """A dollar sign starts a formula in matplotlib; a missing glyph would be an empty box."""
    image = np.full((150, 200, 3), 90, dtype=np.uint8)
    plain = np.asarray(make_explanation(image, [[(60.0, 70.0)]], name="class 1").draw())
    for name in ("$\\frac{1$", "10 $ and 20 $"):
        assert (np.asarray(make_explanation(image, [[(60.0, 70.0)]], name=name).draw()) != plain).any()
    assert not caplog.records
    unknown = np.asarray(make_explanation(image, [[(60.0, 70.0)]], name="\U0010fffd").draw())
    assert (unknown == plain).all()
    assert "class 1" in caplog.text


def test_gif_keeps_the_colors(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    explanation = make_explanation(noise, [[(60.0, 70.0), (90.0, 30.0)]], weights=[0.7, 0.3])
    path = explanation.save(tmp_path / "a.gif")
    expected, [actual] = np.asarray(explanation.draw(layer=0)), [np.asarray(Image.open(path).convert("RGB"))]
    for color in ((253, 231, 37), (230, 159, 0)):  # largest weight, box
        region = close_to(expected, color, 2)
        assert region.sum() > 100
        assert np.median(np.abs(actual[region].astype(int) - color)) <= 2


def test_viewport_contains_the_box_and_most_attention():
    image = np.zeros((400, 600, 3), dtype=np.uint8)
    points, box = [(300.0, 200.0), (290.0, 210.0), (5000.0, 5000.0)], (280.0, 190.0, 320.0, 230.0)
    explanation = make_explanation(image, [points], box, weights=[0.5, 0.495, 0.005])
    view = explanation.viewport()
    assert view.x1 < 280
    assert view.y1 < 190
    assert view.x2 > 320
    assert view.y2 > 230
    assert view.width < 120  # one distant point of negligible weight is ignored
    assert view.width / view.height == pytest.approx(1.5)
    inside = view.clamp(np.array([[5000.0, 5000.0], [300.0, 200.0]]))
    assert view.contains(inside).all()
    assert inside[1].tolist() == [300, 200]


@pytest.mark.parametrize("size", [(13, 20), (64, 64), (40, 900), (900, 40), (2000, 3000)])
def test_figure_size(size):
    model = random_model(two_stage=True, refine=True)
    explanation = explain(model, random_image(*size), threshold=0.0)
    drawn = explanation.draw()
    assert drawn.mode == "RGB"
    assert 600 <= max(drawn.size) <= 3000
    assert min(drawn.size) >= 300


def test_one_encoder_layer_has_a_panel_per_token():
    explanation = explain(random_model(encoder_layers=1), random_image(67, 101), point=(30, 30))
    all_layers, one_layer = explanation.draw(), explanation.draw(layer=0)
    assert one_layer.height > 1.3 * all_layers.height


def test_gif_has_one_frame_per_layer(tmp_path):
    image = np.full((150, 200, 3), 90, dtype=np.uint8)
    path = make_explanation(image, [[(50.0, 50.0)], [(90.0, 90.0)], [(120.0, 60.0)]]).save(tmp_path / "moving.gif")
    with Image.open(path) as gif:
        assert gif.format == "GIF"
        assert gif.n_frames == 3
        frames = []
        for number in range(3):
            gif.seek(number)
            frames.append(np.asarray(gif.convert("RGB")).copy())
    assert all((a != b).any() for a, b in itertools.pairwise(frames))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".WEBP"])
def test_image_formats(tmp_path, suffix):
    image = np.full((150, 200, 3), 90, dtype=np.uint8)
    path = make_explanation(image, [[(50.0, 50.0)]], name="a very long class name " * 20).save(
        tmp_path / f"still{suffix}", 0
    )
    with Image.open(path) as figure:
        assert getattr(figure, "n_frames", 1) == 1
        assert figure.width < 2000


def test_errors(tmp_path):
    explanation = make_explanation(np.zeros((150, 200, 3), dtype=np.uint8), [[(50.0, 50.0)]])
    with pytest.raises(UserError, match="no layer 2: the decoder has 1"):
        explanation.draw(layer=1)
    with pytest.raises(UserError, match="no layer 0"):
        explanation.draw(layer=-1)
    with pytest.raises(UserError, match=r"'\.xyz' is not an image format"):
        explanation.save(tmp_path / "a.xyz")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        explanation.save(tmp_path / "file" / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_attention_inside_box():
    image, points = np.zeros((150, 200, 3), dtype=np.uint8), [(1.0, 1.0), (5.0, 5.0), (10.0, 0.0), (11.0, 2.0)]
    explanation = make_explanation(image, [points], weights=[0.1, 0.4, 0.2, 0.3])
    for box, share in [((0, 0, 10, 4), 0.3), ((0, 0, 99, 99), 1.0), ((2, 2, 4, 4), 0.0)]:
        assert explanation.attention_inside_box(torch.tensor(box)).tolist() == pytest.approx([share])


def test_notebooks_show_the_figure():
    explanation = make_explanation(np.full((150, 200, 3), 90, np.uint8), [[(60.0, 50.0)], [(80.0, 60.0)]])
    picture = Image.open(io.BytesIO(explanation._repr_png_() or b""))
    drawn = explanation.draw()
    drawn.thumbnail((NOTEBOOK_SIDE, NOTEBOOK_SIDE), Image.Resampling.LANCZOS)
    assert np.array_equal(picture.convert("RGB"), drawn)
    assert max(picture.size) <= NOTEBOOK_SIDE
