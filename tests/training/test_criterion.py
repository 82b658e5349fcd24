import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.ops import box_convert, box_iou, generalized_box_iou, sigmoid_focal_loss

from deformable_detr.config.schema import TrainConfig
from deformable_detr.structures import Target
from deformable_detr.training import criterion
from deformable_detr.training.criterion import SetCriterion, cardinality_error
from deformable_detr.training.matcher import HungarianMatcher, PackedTargets, Predictions
from tests.support.training import random_boxes, random_outputs, random_targets

CONFIG = TrainConfig()


def reference_losses(outputs, targets, num_boxes):
    """Compute the losses in a loop over layers and images, as the published code does."""
    layers = [
        (f"_{n}", outputs["layer_logits"][n], outputs["layer_boxes"][n], targets)
        for n in range(len(outputs["layer_logits"]))
    ]
    layers[-1] = ("", *layers[-1][1:])
    if "encoder_logits" in outputs:
        binary = [Target(torch.zeros_like(t.labels), t.boxes, t.image_id, t.original_size) for t in targets]
        layers.append(("_encoder", outputs["encoder_logits"], outputs["encoder_boxes"], binary))
    parts = {}
    for suffix, logits, boxes, layer_targets in layers:
        predictions = Predictions(logits[None], boxes[None])
        matches = HungarianMatcher(CONFIG)([predictions], PackedTargets.pack(layer_targets))[0][0]
        parts |= {f"loss_{kind}{suffix}": torch.zeros(()) for kind in ("class", "bbox", "giou")}
        first = 0
        for image, target in enumerate(layer_targets):
            matched = matches.image[0] == image
            queries, objects = matches.query[0][matched], matches.target[0][matched] - first
            first += len(target.labels)
            one_hot = torch.zeros_like(logits[image])
            one_hot[queries, target.labels[objects]] = 1
            parts[f"loss_class{suffix}"] = parts[f"loss_class{suffix}"] + sigmoid_focal_loss(
                logits[image], one_hot, alpha=0.25, gamma=2, reduction="sum"
            )
            pair = boxes[image][queries], target.boxes[objects]
            parts[f"loss_bbox{suffix}"] = parts[f"loss_bbox{suffix}"] + (pair[0] - pair[1]).abs().sum()
            giou = generalized_box_iou(*(box_convert(item, "cxcywh", "xyxy") for item in pair)).diagonal()
            parts[f"loss_giou{suffix}"] = parts[f"loss_giou{suffix}"] + (1 - giou).sum()
    parts = {name: value / num_boxes for name, value in parts.items()}
    weights = {"class": 2.0, "bbox": 5.0, "giou": 2.0}
    return parts, sum(weights[name.split("_")[1]] * value for name, value in parts.items())


@pytest.mark.parametrize("sizes", [[3, 0, 5], [1], [12, 2]])
@pytest.mark.parametrize("tokens", [0, 14])
def test_losses_and_gradients_match_the_reference(sizes, tokens):
    generator = torch.Generator().manual_seed(len(sizes))
    outputs = random_outputs(3, len(sizes), 8, 5, generator, tokens)
    targets = random_targets(sizes, 5, generator)
    result = SetCriterion(CONFIG)(outputs, PackedTargets.pack(targets))
    gradients = torch.autograd.grad(result.total, list(outputs.values()))

    expected, total = reference_losses(outputs, targets, sum(sizes))
    torch.testing.assert_close(result.total, total)
    assert result.parts.keys() == expected.keys() | {"cardinality_error"}
    for name, value in expected.items():
        torch.testing.assert_close(result.parts[name], value.detach(), msg=name)
    for gradient, expected_gradient in zip(gradients, torch.autograd.grad(total, list(outputs.values())), strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


def test_matchability_aware_loss_has_powers_of_the_iou_as_targets():
    generator = torch.Generator().manual_seed(2)
    outputs, (target,) = random_outputs(1, 1, 8, 5, generator), random_targets([3], 5, generator)
    with torch.no_grad():
        outputs["layer_boxes"][0, 0, :3] = target.boxes * torch.tensor([1, 1, 0.8, 1.1])
    targets, config = PackedTargets.pack([target]), CONFIG.replace(class_loss="mal")
    parts = SetCriterion(config)(outputs, targets).parts
    logits, boxes = (outputs[name][0, 0].detach() for name in ("layer_logits", "layer_boxes"))
    (matches,), _ = HungarianMatcher(config)([Predictions(logits[None, None], boxes[None, None])], targets)
    query, matched = matches.query[0], matches.target[0]
    iou = box_iou(*(box_convert(item, "cxcywh", "xyxy") for item in (boxes[query], target.boxes[matched]))).diagonal()
    assert iou.max() > 0.5

    soft_targets, weights = torch.zeros_like(logits), logits.sigmoid() ** 1.5
    soft_targets[query, target.labels[matched]] = iou**1.5
    weights[query, target.labels[matched]] = 1
    expected = binary_cross_entropy_with_logits(logits, soft_targets, weights, reduction="sum") / 3
    torch.testing.assert_close(parts["loss_class"], expected)


def test_comparison_detects_a_wrong_weight():
    generator = torch.Generator().manual_seed(2)
    outputs, targets = random_outputs(2, 1, 8, 5, generator), random_targets([3], 5, generator)
    wrong = SetCriterion(CONFIG.replace(giou_weight=1.9))(outputs, PackedTargets.pack(targets)).total
    assert not torch.allclose(wrong, reference_losses(outputs, targets, 3)[1])


def test_explicit_num_boxes_is_the_divisor():
    generator = torch.Generator().manual_seed(2)
    outputs = random_outputs(2, 2, 8, 5, generator, 9)
    targets, loss = PackedTargets.pack(random_targets([3, 1], 5, generator)), SetCriterion(CONFIG)
    total = loss(outputs, targets).total
    torch.testing.assert_close(loss(outputs, targets, num_boxes=8.0).total * 2, total)
    torch.testing.assert_close(loss(outputs, targets, num_boxes=torch.tensor(4)).total, total)


def test_batch_without_objects_has_finite_gradients():
    outputs = random_outputs(2, 3, 8, 5, torch.Generator().manual_seed(2), 9)
    result = SetCriterion(CONFIG)(outputs, PackedTargets.pack(random_targets([0, 0, 0], 5, torch.Generator())))
    result.total.backward()
    assert result.parts["loss_class"] > 0
    assert result.parts["loss_bbox"] == result.parts["loss_giou"] == 0
    for name, value in outputs.items():  # zeros, not None: DDP needs every parameter on every rank
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name
    assert outputs["layer_logits"].grad.abs().sum() > 0


def test_zero_area_boxes_have_finite_gradients():
    generator = torch.Generator().manual_seed(5)
    boxes = random_boxes(2, 1, 8, generator=generator)
    boxes[..., :4, 2:] = 0
    outputs = {"layer_logits": torch.randn(2, 1, 8, 3, generator=generator), "layer_boxes": boxes}
    outputs = {name: value.requires_grad_() for name, value in outputs.items()}
    target = Target(
        torch.tensor([0, 1, 2]), torch.tensor([[0.5, 0.5, 0, 0], [0.2, 0.2, 0, 0.3], [1.0, 1, 0, 0]]), 1, (9, 9)
    )
    result = SetCriterion(CONFIG)(outputs, PackedTargets.pack([target]))
    result.total.backward()
    assert result.total.isfinite()
    assert result.finite == [True]
    assert all(value.grad.isfinite().all() for value in outputs.values())


def test_predicted_boxes_equal_to_zero_area_targets_have_finite_gradients():
    box = torch.tensor([0.5, 0.5, 0.0, 0.0])
    outputs = {"layer_logits": torch.zeros(1, 1, 1, 1), "layer_boxes": box.expand(1, 1, 1, 4).clone().requires_grad_()}
    result = SetCriterion(CONFIG)(outputs, PackedTargets.pack([Target(torch.tensor([0]), box[None], 1, (9, 9))]))
    result.total.backward()
    assert result.total.isfinite()
    assert outputs["layer_boxes"].grad.isfinite().all()


def test_encoder_loss_is_class_agnostic_in_column_0():
    generator = torch.Generator().manual_seed(7)
    outputs, targets = random_outputs(1, 1, 4, 5, generator, tokens=9), random_targets([2], 5, generator)
    result = SetCriterion(CONFIG)(outputs, PackedTargets.pack(targets))
    (gradient,) = torch.autograd.grad(result.total, outputs["encoder_logits"])
    assert (gradient.abs().sum(dim=(0, 1)) > 0).all()
    assert (gradient[..., 0] < 0).sum() == 2  # only the two matched proposals
    assert (gradient[..., 1:] > 0).all()


def test_auxiliary_losses_can_be_disabled():
    generator = torch.Generator().manual_seed(7)
    outputs, targets = random_outputs(3, 1, 4, 5, generator, tokens=9), random_targets([2], 5, generator)
    parts = SetCriterion(CONFIG.replace(auxiliary_loss=False))(outputs, PackedTargets.pack(targets)).parts
    kinds = ("loss_class", "loss_bbox", "loss_giou")
    assert parts.keys() == {*kinds, *(f"{kind}_encoder" for kind in kinds), "cardinality_error"}
    full = SetCriterion(CONFIG)(outputs, PackedTargets.pack(targets)).parts
    torch.testing.assert_close(parts["loss_bbox"], full["loss_bbox"])
    assert "loss_bbox_1" in full
    assert "loss_bbox_2" not in full


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_under_autocast(dtype):
    generator = torch.Generator().manual_seed(7)
    outputs, targets = random_outputs(2, 1, 4, 5, generator, tokens=9), random_targets([2], 5, generator)
    outputs = {name: value.detach().to(dtype) if "logits" in name else value for name, value in outputs.items()}
    with torch.autocast("cpu", dtype=dtype):
        inside = SetCriterion(CONFIG)(outputs, PackedTargets.pack(targets))
    outside = SetCriterion(CONFIG)(outputs, PackedTargets.pack(targets))
    assert inside.total.dtype == torch.float32
    assert inside.total == outside.total


def test_nan_predictions_are_marked_per_image():
    generator = torch.Generator().manual_seed(7)
    outputs, targets = random_outputs(2, 2, 4, 5, generator), random_targets([2, 0], 5, generator)
    with torch.no_grad():
        outputs["layer_logits"][0, 1, 0, 0] = float("nan")
    result = SetCriterion(CONFIG)(outputs, PackedTargets.pack(targets))
    assert result.finite == [True, False]
    assert result.total.isnan()


def test_cardinality_error_counts_scores_above_0_5():
    logits = torch.full((2, 5, 3), -4.0)
    logits[0, :3, 1] = 4.0
    assert cardinality_error(logits, torch.tensor([1, 2])) == 2.0


def pairwise_iou(boxes, others):
    return box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(others, "cxcywh", "xyxy"))


def roi_case(sizes, seed=3):
    """Return outputs whose last layer overlaps the objects, and the targets."""
    generator = torch.Generator().manual_seed(seed)
    targets = random_targets(sizes, 5, generator)
    outputs = random_outputs(3, len(sizes), 8, 5, generator)
    with torch.no_grad():
        for image, target in enumerate(targets):
            for query in range(6 if len(target.labels) else 0):  # two queries are left alone
                noise = 0.12 * torch.randn(2, 4, generator=generator)
                near = target.boxes[query % len(target.labels)] * (1 + noise)
                outputs["layer_boxes"][1:, image, query] = near.clamp(0.01, 0.99)
    return outputs, targets


@pytest.mark.parametrize("class_loss", ["focal", "mal"])
def test_roi_head_learns_every_query_that_overlaps_an_object(class_loss):
    config = CONFIG.replace(class_loss=class_loss)
    outputs, targets = roi_case([3, 0, 2])
    result = SetCriterion(config, one_to_many_roi=True)(outputs, PackedTargets.pack(targets))
    plain = SetCriterion(config)(outputs, PackedTargets.pack(targets))
    layers = Predictions(outputs["layer_logits"], outputs["layer_boxes"])
    matches = HungarianMatcher(config)([layers], PackedTargets.pack(targets))[0][0]
    expected, pairs, first = torch.zeros(3), 0, 0
    for image, target in enumerate(targets):
        logits, boxes = outputs["layer_logits"][-1, image], outputs["layer_boxes"][-1, image]
        count = len(target.labels)
        assigned = dict.fromkeys(range(8))
        if count:
            iou = pairwise_iou(outputs["layer_boxes"][-2, image], target.boxes)  # (8, count)
            assigned = {q: int(row.argmax()) if row.max() >= 0.6 else None for q, row in enumerate(iou)}
        for index in (matches.image[-1] == image).nonzero()[:, 0].tolist():
            assigned[int(matches.query[-1, index])] = int(matches.target[-1, index]) - first
        chosen = {q: o for q, o in assigned.items() if o is not None}
        losses, one_hot, positive = torch.zeros(3), torch.zeros(8, 5), torch.zeros(8, 5, dtype=torch.bool)
        for query, index in chosen.items():
            overlap = pairwise_iou(boxes[query][None], target.boxes[index][None])[0, 0]
            positive[query, target.labels[index]] = True
            one_hot[query, target.labels[index]] = 1 if class_loss == "focal" else overlap.detach() ** 1.5
            losses[1] += (boxes[query] - target.boxes[index]).abs().sum()
            corners = box_convert(torch.stack([boxes[query], target.boxes[index]]), "cxcywh", "xyxy")
            losses[2] += 1 - generalized_box_iou(corners[:1], corners[1:])[0, 0]
        if class_loss == "focal":
            losses[0] = sigmoid_focal_loss(logits, one_hot, alpha=0.25, gamma=2, reduction="sum")
        else:
            entropy = binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
            losses[0] = entropy.where(positive, logits.sigmoid() ** 1.5 * entropy).sum()
        expected += losses * (count / len(chosen) if count else 1)
        pairs, first = pairs + len(chosen), first + count
    assert pairs > 5 + 2
    for name, value in zip(("loss_class", "loss_bbox", "loss_giou"), expected / 5, strict=True):
        torch.testing.assert_close(result.parts[name], value.detach())
        assert not torch.isclose(plain.parts[name], value)
    assert all(torch.equal(result.parts[name], plain.parts[name]) for name in result.parts if name[-2:] in ("_0", "_1"))
    result.total.backward()
    assert outputs["layer_boxes"].grad[-1].abs().sum() > 0


def test_roi_head_without_overlaps_or_objects_learns_one_to_one(monkeypatch):
    for sizes in ([3, 0, 2], [0, 0]):
        monkeypatch.setattr(criterion, "ROI_IOU", 1.1)
        outputs, targets = roi_case(sizes)
        many = SetCriterion(CONFIG, one_to_many_roi=True)(outputs, PackedTargets.pack(targets))
        one = SetCriterion(CONFIG)(outputs, PackedTargets.pack(targets))
        for name, value in one.parts.items():
            torch.testing.assert_close(many.parts[name], value)
        gradients = [torch.autograd.grad(loss.total, list(outputs.values())) for loss in (many, one)]
        for mine, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_roi_losses_of_a_batch_are_the_sum_of_those_of_its_images():
    """So they do not depend on the number of processes or of accumulated batches."""
    outputs, targets = roi_case([3, 0, 2])
    many = SetCriterion(CONFIG, one_to_many_roi=True)
    whole = many(outputs, PackedTargets.pack(targets), num_boxes=5.0).total
    parts = [
        many({k: v[:, i : i + 1] for k, v in outputs.items()}, PackedTargets.pack([target]), num_boxes=5.0).total
        for i, target in enumerate(targets)
    ]
    torch.testing.assert_close(whole, sum(parts))
