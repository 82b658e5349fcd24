import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, generalized_box_iou

from deformable_detr.config.schema import TrainConfig
from deformable_detr.training.matcher import HungarianMatcher, PackedTargets, Predictions, focal_terms
from tests.support.training import random_outputs, random_targets

CONFIG = TrainConfig()


def official_cost(logits, boxes, labels, objects):
    """Return the (Q, N) cost of one image as the published code computes it."""
    p = logits.double().sigmoid()
    negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
    positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    cost_class = positive[:, labels] - negative[:, labels]
    cost_l1 = torch.cdist(boxes.double(), objects.double(), p=1)
    giou = generalized_box_iou(*(box_convert(item.double(), "cxcywh", "xyxy") for item in (boxes, objects)))
    return 2 * cost_class + 5 * cost_l1 - 2 * giou


def pairs_of(matches, layer, image):
    """Return {(query, object)} of an image; objects are indices into the packed batch."""
    selected = matches.image[layer] == image
    return set(zip(matches.query[layer][selected].tolist(), matches.target[layer][selected].tolist(), strict=True))


@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [1], [0, 2], [9, 2, 7]])
def test_matches_equal_the_official_ones(sizes):
    generator = torch.Generator().manual_seed(sum(sizes))
    outputs = random_outputs(3, len(sizes), 8, 6, generator, tokens=15)
    targets = random_targets(sizes, 6, generator)
    packed = PackedTargets.pack(targets)
    decoder = Predictions(outputs["layer_logits"], outputs["layer_boxes"])
    encoder = Predictions(outputs["encoder_logits"][None], outputs["encoder_boxes"][None], class_agnostic=True)
    all_matches, finite = HungarianMatcher(CONFIG)([decoder, encoder], packed)
    assert finite == [True] * len(sizes)

    for item, matches in zip((decoder, encoder), all_matches, strict=True):
        for layer, (image, target) in itertools.product(range(len(item.logits)), enumerate(targets)):
            labels = torch.zeros_like(target.labels) if item.class_agnostic else target.labels
            cost = official_cost(item.logits[layer, image], item.boxes[layer, image], labels, target.boxes)
            rows, columns = linear_sum_assignment(cost.detach())
            first = sum(sizes[:image])
            expected = {(int(row), int(column) + first) for row, column in zip(rows, columns, strict=True)}
            assert pairs_of(matches, layer, image) == expected


def test_match_has_the_lowest_total_cost():
    generator = torch.Generator().manual_seed(3)
    outputs, targets = random_outputs(1, 1, 5, 2, generator), random_targets([3], 2, generator)
    logits, boxes = outputs["layer_logits"], outputs["layer_boxes"]
    matches = HungarianMatcher(CONFIG)([Predictions(logits, boxes)], PackedTargets.pack(targets))[0][0]
    cost = official_cost(logits[0, 0], boxes[0, 0], targets[0].labels, targets[0].boxes)
    costs = {
        order: sum(cost[q, n].item() for n, q in enumerate(order)) for order in itertools.permutations(range(5), 3)
    }
    best = min(costs, key=costs.__getitem__)
    assert pairs_of(matches, 0, 0) == {(query, number) for number, query in enumerate(best)}


def test_matching_copies_to_the_host_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    outputs = random_outputs(6, 2, 8, 4, generator, tokens=10)
    packed = PackedTargets.pack(random_targets([2, 3], 4, generator))
    copies = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or original(self))
    for name in ("item", "tolist", "__bool__", "nonzero"):
        wrapped = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, w=wrapped: copies.append(self.shape) or w(self))
    HungarianMatcher(CONFIG)(
        [
            Predictions(outputs["layer_logits"], outputs["layer_boxes"]),
            Predictions(outputs["encoder_logits"][None], outputs["encoder_boxes"][None], True),
        ],
        packed,
    )
    assert copies == [(5 * (6 * 8 + 10) + 2,)]  # same-image pair costs and one flag per image


def test_more_objects_than_queries():
    generator = torch.Generator().manual_seed(1)
    outputs = random_outputs(2, 2, 4, 3, generator)
    packed = PackedTargets.pack(random_targets([9, 2], 3, generator))
    matches = HungarianMatcher(CONFIG)([Predictions(outputs["layer_logits"], outputs["layer_boxes"])], packed)[0][0]
    assert matches.query.shape == (2, 4 + 2)
    for layer in range(2):
        assert len({query for query, _ in pairs_of(matches, layer, 0)}) == 4
        assert len({target for _, target in pairs_of(matches, layer, 0)}) == 4


def test_no_objects():
    outputs = random_outputs(2, 3, 4, 3, torch.Generator().manual_seed(1))
    packed = PackedTargets.pack(random_targets([0, 0, 0], 3, torch.Generator()))
    matches, finite = HungarianMatcher(CONFIG)([Predictions(outputs["layer_logits"], outputs["layer_boxes"])], packed)
    assert matches[0].query.shape == (2, 0)
    assert finite == [True, True, True]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["layer_logits", "layer_boxes", "encoder_logits", "encoder_boxes", "target"])
@pytest.mark.parametrize("sizes", [[2, 3, 1], [0, 2, 0]])
def test_non_finite_images_are_marked_and_not_passed_to_scipy(value, where, sizes):
    generator = torch.Generator().manual_seed(1)
    outputs = random_outputs(2, 3, 4, 3, generator, tokens=6)
    targets = random_targets(sizes, 3, generator)
    with torch.no_grad():
        if where == "target":
            targets[1].boxes[0, 0] = value
        elif where.startswith("layer"):
            outputs[where][0, 1, 2, 1] = value
        else:
            outputs[where][1, 2, 1] = value
    predictions = [
        Predictions(outputs["layer_logits"], outputs["layer_boxes"]),
        Predictions(outputs["encoder_logits"][None], outputs["encoder_boxes"][None], True),
    ]
    matches, finite = HungarianMatcher(CONFIG)(predictions, PackedTargets.pack(targets))
    assert finite == [True, False, True]
    assert matches[0].query.shape == (2, sum(min(size, 4) for size in sizes))


def test_scipy_raises_on_nan():
    with pytest.raises(ValueError, match="invalid numeric entries"):
        linear_sum_assignment([[float("nan"), 1.0], [1.0, 2.0]])


def test_focal_terms_match_the_formula_and_stay_finite():
    logits = torch.tensor([-3.0, -0.5, 0.0, 2.0], dtype=torch.float64)
    p = logits.sigmoid()
    positive, negative = focal_terms(logits, 0.25, 2.0)
    torch.testing.assert_close(positive, -0.25 * (1 - p) ** 2 * p.log())
    torch.testing.assert_close(negative, -0.75 * p**2 * (1 - p).log())
    for gamma in (0.0, 0.5, 2.0):
        extreme = torch.tensor([-1e4, -200.0, 200.0, 1e4], requires_grad=True)
        total = sum(term.sum() for term in focal_terms(extreme, 0.25, gamma))
        total.backward()
        assert total.isfinite()
        assert extreme.grad.isfinite().all()
