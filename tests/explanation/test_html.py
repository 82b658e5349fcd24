"""The page is self-contained, shows the positions of the tensors and escapes class names."""

import json
import re

import pytest
import torch

from deformable_detr import UserError
from deformable_detr.explanation import trace
from deformable_detr.explanation.html import page
from tests.support.explanations import HEADS, LEVELS, POINTS, random_image, random_model


@pytest.fixture(scope="module")
def traced():
    model = random_model(two_stage=True, refine=True, class_names=("red", "</script><b>green", "蓝 & <!--"))
    return trace(model, random_image(67, 101), threshold=0.0, top_k=18)


def content(text):
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert match
    return json.loads(match[1])


def test_points_equal_the_tensors(traced):
    explanation = traced.detection(2)
    data = content(page(traced, explanation))
    assert data["first"] == 2
    assert len(data["items"]) == len(traced.detections) == 18
    for number, item in enumerate(data["items"]):
        expected = traced.detection(number)
        assert item["name"] == expected.name
        for layer, sampling, share in zip(
            item["layers"], expected.layers, expected.attention_inside_box().tolist(), strict=True
        ):
            points = torch.tensor(layer["points"]).view(HEADS, LEVELS, POINTS, 3)
            torch.testing.assert_close(points[..., :2] / 10, sampling.locations, atol=0.0501, rtol=0)
            torch.testing.assert_close(points[..., 2] / 10000, sampling.weights, atol=5.1e-5, rtol=0)
            assert layer["box"] == pytest.approx(sampling.box.tolist(), abs=0.006)
            assert layer["reference_point"] == pytest.approx(sampling.reference_point.tolist(), abs=0.006)
            assert layer["share_inside_box"] == pytest.approx(share, abs=1e-4)


def test_page_of_a_point(traced):
    explanation = traced.point(20, 30)
    data = content(page(traced, explanation, layer=1))
    assert [item["kind"] for item in data["items"]] == ["point"]
    assert data["layer"] == 1
    points = torch.tensor(data["items"][0]["layers"][0]["points"]).view(LEVELS, HEADS, LEVELS, POINTS, 3)
    torch.testing.assert_close(points[..., :2] / 10, explanation.layers[0].locations, atol=0.0501, rtol=0)


def test_page_is_self_contained_and_escapes_names(traced):
    text = page(traced, traced.detection(0))
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", re.sub(r"base64,[\w+/=]+", "", text)))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(?:link|iframe|script)[^>]+(?:href|src)=", text)
    assert text.count("</script>") == 2
    assert "<b>green" not in text
    assert any(item["name"] == "</script><b>green" for item in content(text)["items"])
    assert text.index("data:image/jpeg;base64,")


def test_errors(traced):
    with pytest.raises(UserError, match="no layer 9"):
        page(traced, traced.detection(0), layer=8)
