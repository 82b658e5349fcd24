"""Mask costs and losses at points: equal to loops over objects, bounded in memory, complete in their gradients."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, grid_sample
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deformable_detr.config.schema import TrainConfig
from deformable_detr.data.dataloader import collate
from deformable_detr.detector import DeformableDETR
from deformable_detr.model.postprocess import postprocess
from deformable_detr.predict.predictor import forward
from deformable_detr.structures import ImageBatch, Target
from deformable_detr.training.criterion import SetCriterion
from deformable_detr.training.denoising import BatchConsistentRng
from deformable_detr.training.mask_loss import MaskCriterion, mask_values, sample_features
from deformable_detr.training.matcher import Matches, PackedTargets, Predictions
from deformable_detr.training.step import BatchStats, TrainStep, count_objects
from deformable_detr.utils.rle import decode_masks
from tests.support.training import random_outputs, random_targets, tiny_config

CONFIG = TrainConfig(mask_points=16)
LAYERS, QUERIES, D = 2, 6, 8


def mask_outputs(sizes, generator, canvas=(12, 16)):
    """Return outputs of a model with masks and the points of their loss; the second image is padded."""
    outputs = random_outputs(LAYERS, len(sizes), QUERIES, 3, generator)
    outputs["mask_features"] = torch.randn(len(sizes), D, *canvas, generator=generator).requires_grad_()
    shape = (LAYERS, len(sizes), QUERIES, D)
    outputs["layer_mask_embeddings"] = torch.randn(shape, generator=generator).requires_grad_()
    padding_mask = torch.zeros(len(sizes), 4 * canvas[0], 4 * canvas[1], dtype=torch.bool)
    padding_mask[1:, :, 2 * canvas[1] :] = True
    images = ImageBatch(padding_mask[:, None].expand(-1, 3, -1, -1), padding_mask)
    rng = BatchConsistentRng(len(sizes), seed=3)
    return outputs | MaskCriterion(CONFIG).draw_points(images, rng)


def batch(sizes=(3, 0, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = random_targets(list(sizes), 3, generator, masks=True)
    return mask_outputs(sizes, generator), targets, PackedTargets.pack(targets)


def logits_at(outputs, image, embeddings, points):
    """Logits (…, P) of embeddings (…, D) at points (P, 2) in 0..1 of the image, by `grid_sample`."""
    canvas = points * outputs["content_ratios"][image].flip(0)
    features = outputs["mask_features"][image : image + 1]
    sampled = grid_sample(features, canvas[None, None] * 2 - 1, padding_mode="border", align_corners=False)
    return embeddings @ sampled[0, :, 0]


def dice(logits, values):
    p = logits.sigmoid()
    return 1 - (2 * (p * values).sum(-1) + 1) / (p.sum(-1) + values.sum(-1) + 1)


def test_features_are_interpolated_as_by_grid_sample():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 5, 7, 9, generator=generator, dtype=torch.float64).requires_grad_()
    points = torch.rand(4, 50, 2, generator=generator, dtype=torch.float64) * 1.2 - 0.1
    points[0, :4] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.5, 1.0]])
    image = torch.tensor([2, 0, 0, 1])
    grid = points[:, None] * 2 - 1
    expected = grid_sample(features[image], grid, padding_mode="border", align_corners=False)[:, :, 0].transpose(1, 2)
    sampled = sample_features(features, points, image)
    torch.testing.assert_close(sampled, expected)
    weights = torch.randn(sampled.shape, generator=generator, dtype=torch.float64)
    first, second = (torch.autograd.grad((x * weights).sum(), features)[0] for x in (sampled, expected))
    torch.testing.assert_close(first, second)


def test_mask_values_are_coverage_inside_the_box_and_0_outside():
    masks = torch.tensor([[[255, 0], [51, 255]]], dtype=torch.uint8)
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.2]])  # x 0.3 to 0.7, y 0.4 to 0.6
    points = torch.tensor([[[0.4, 0.45], [0.6, 0.45], [0.4, 0.55], [0.5, 0.55], [0.1, 0.45], [0.4, 0.7]]])
    values = mask_values(masks, boxes, points)[0]
    torch.testing.assert_close(values, torch.tensor([1.0, 0.0, 0.2, 0.6, 0.0, 0.0]))


def test_costs_equal_a_loop_and_are_0_without_a_mask():
    outputs, targets, packed = batch()
    costs = MaskCriterion(CONFIG).costs(outputs, packed, slice(None))
    assert costs.shape == (8, LAYERS, QUERIES)
    first = 0
    for image, target in enumerate(targets):
        random = outputs["mask_points"][image, -16:]
        numbers = [number for number in range(len(target.labels)) if target.has_mask[number]]
        for number in range(len(target.labels)):
            cost = costs[first + number]
            if number not in numbers:
                assert not cost.any()
                continue
            points = list(random[:8])
            for index, point in enumerate(random[8:]):  # taken by the objects in turn
                box = target.boxes[numbers[index % len(numbers)]]
                low, high = (box[:2] - 0.75 * box[2:]).clamp(0, 1), (box[:2] + 0.75 * box[2:]).clamp(0, 1)
                points.append(low + point * (high - low))
            points = torch.stack(points)
            values = mask_values(target.masks[number][None], target.boxes[number][None], points[None])[0]
            logits = logits_at(outputs, image, outputs["layer_mask_embeddings"][:, image], points)
            entropy = binary_cross_entropy_with_logits(logits, values.expand_as(logits), reduction="none").mean(-1)
            torch.testing.assert_close(cost, 2.5 * (entropy + dice(logits, values)), rtol=1e-4, atol=1e-4)
        first += len(target.labels)


def test_the_matcher_adds_the_costs():
    """With the mask cost alone, the query whose mask is the object's is matched."""
    config = CONFIG.replace(class_cost=0.0, l1_cost=0.0, giou_cost=0.0)
    outputs, _, packed = batch()
    costs = MaskCriterion(config).costs(outputs, packed, slice(None))
    matches, _ = SetCriterion(config).matcher([_predictions(outputs)], packed, costs)
    masked = packed.masked[packed.image[packed.masked] == 0]
    chosen = {int(t): int(q) for t, q in zip(matches[0].target[0], matches[0].query[0], strict=True)}
    total = sum(float(costs[n, 0, chosen[int(n)]]) for n in masked)
    permutations = [
        float(costs[masked[0], 0, a] + costs[masked[1], 0, b]) for a in range(6) for b in range(6) if a != b
    ]
    assert total == pytest.approx(min(permutations))


def _predictions(outputs):
    return Predictions(outputs["layer_logits"].detach(), outputs["layer_boxes"].detach())


def test_losses_equal_a_loop_over_the_matched_pairs():
    outputs, _, packed = batch()
    criterion = MaskCriterion(CONFIG)
    matches = SetCriterion(CONFIG).matcher([_predictions(outputs)], packed)[0][0]
    last = {int(t): int(q) for t, q in zip(matches.target[-1], matches.query[-1], strict=True)}
    embeddings = [outputs["layer_mask_embeddings"][-1, packed.image[n], last[int(n)]] for n in packed.masked]
    points = criterion._points(outputs, packed, torch.stack(embeddings).detach())
    assert points.shape == (len(packed.masked), 16, 2)
    table, denoising = criterion.losses(outputs, packed, matches, None)
    assert denoising is None
    expected = torch.zeros(2, LAYERS)
    row_of = {int(n): row for row, n in enumerate(packed.masked)}
    for layer in range(LAYERS):
        for image, query, number in zip(matches.image[layer], matches.query[layer], matches.target[layer], strict=True):
            if int(number) not in row_of:
                continue
            row = row_of[int(number)]
            values = mask_values(packed.masks[row][None], packed.boxes[number][None], points[row][None])[0]
            logits = logits_at(outputs, int(image), outputs["layer_mask_embeddings"][layer, image, query], points[row])
            expected[0, layer] += binary_cross_entropy_with_logits(logits, values)
            expected[1, layer] += dice(logits, values)
    torch.testing.assert_close(table, expected, rtol=1e-4, atol=1e-4)


def test_most_points_are_the_most_uncertain_candidates():
    outputs, _, packed = batch()
    criterion = MaskCriterion(CONFIG)
    embeddings = outputs["layer_mask_embeddings"][-1, 0, :2].detach()
    packed = PackedTargets.pack(random_targets([2], 3, torch.Generator().manual_seed(1), masks=True))
    outputs = {name: value[:1] if name != "layer_mask_embeddings" else value[:, :1] for name, value in outputs.items()}
    points = criterion._points(outputs, packed, embeddings)
    for row in range(2):
        logits = logits_at(outputs, 0, embeddings[row], points[row]).abs().detach()
        everywhere = logits_at(outputs, 0, embeddings[row], torch.rand(500, 2)).abs().detach()
        assert logits[:12].median() < 0.6 * everywhere.median()
        assert logits[12:].median() > logits[:12].median()


def test_denoising_queries_learn_masks_and_are_averaged_over_groups():
    outputs, _, packed = batch()
    matches = SetCriterion(CONFIG).matcher([_predictions(outputs)], packed)[0][0]
    criterion = MaskCriterion(CONFIG)
    groups, most = 2, 5
    noisy = torch.randn(LAYERS, 3, groups * 2 * most, D, generator=torch.Generator().manual_seed(2)).requires_grad_()
    position = torch.cat([torch.arange(n) for n in packed.host_counts])
    query = torch.arange(groups)[:, None] * 2 * most + position
    shape = (1, groups * len(position))
    indices = (packed.image, query, torch.arange(len(position)))
    pairs = Matches(*(index.expand(groups, -1).reshape(shape) for index in indices))
    table, denoising = criterion.losses(
        {**outputs, "denoising_mask_embeddings": noisy}, packed, matches, (pairs, groups)
    )
    torch.testing.assert_close(table, criterion.losses(outputs, packed, matches, None)[0])
    assert denoising is not None
    denoising.sum().backward()
    learned = noisy.grad.abs().sum(-1) > 0
    expected = torch.zeros_like(learned)
    for n in packed.masked:
        expected[:, packed.image[n], query[:, n]] = True
    assert torch.equal(learned, expected)
    same = noisy.detach().clone()
    same[:, :, most * 2 :] = same[:, :, : most * 2]  # two equal groups
    twice = criterion.losses({**outputs, "denoising_mask_embeddings": same}, packed, matches, (pairs, groups))[1]
    first = Matches(*(x[:, : len(position)] for x in (pairs.image, pairs.query, pairs.target)))
    once = criterion.losses({**outputs, "denoising_mask_embeddings": same}, packed, matches, (first, 1))[1]
    torch.testing.assert_close(twice, once)


def test_objects_without_a_mask_train_their_box_only():
    outputs, targets, _ = batch((3,))
    boxes_only = [replace(target, has_mask=torch.tensor([True, True, False])) for target in targets]
    changed = [
        replace(target, masks=target.masks.clone().index_fill_(0, torch.tensor([2]), 77)) for target in boxes_only
    ]
    first, second = (SetCriterion(CONFIG)(outputs, PackedTargets.pack(t)) for t in (boxes_only, changed))
    assert torch.equal(first.total, second.total)
    dropped = [replace(target, has_mask=torch.zeros(3, dtype=torch.bool)) for target in targets]
    none = SetCriterion(CONFIG)(outputs, PackedTargets.pack(dropped))
    unmasked = [replace(target, masks=None, has_mask=None) for target in targets]
    assert torch.equal(none.total, SetCriterion(CONFIG)(outputs, PackedTargets.pack(unmasked)).total)
    assert none.parts["loss_mask"] == none.parts["loss_dice"] == 0
    assert none.parts["loss_bbox"] > 0
    gradients = torch.autograd.grad(none.total, [outputs["mask_features"], outputs["layer_mask_embeddings"]])
    assert not any(gradient.any() for gradient in gradients)


def test_total_is_the_weighted_sum_and_num_masks_divides():
    outputs, _, packed = batch()
    config = CONFIG.replace(mask_weight=3.0, dice_weight=0.5)
    one, half = (SetCriterion(config)(outputs, packed, 8.0, None, count) for count in (1.0, 2.0))
    names = [name for name in one.parts if name.startswith(("loss_mask", "loss_dice"))]
    assert names == ["loss_mask", "loss_dice", "loss_mask_0", "loss_dice_0"]
    weighted = sum((3.0 if "mask" in name else 0.5) * one.parts[name] for name in names)
    torch.testing.assert_close(one.total - half.total, weighted / 2)
    assert list(one.parts)[-1] == "cardinality_error"
    default = SetCriterion(config)(outputs, packed, 8.0)
    torch.testing.assert_close(default.parts["loss_dice"] * len(packed.masked), one.parts["loss_dice"])


def test_more_objects_than_queries():
    outputs, _, packed = batch((9, 1))
    result = SetCriterion(CONFIG)(outputs, packed)
    assert result.total.isfinite()
    result.total.backward()
    assert outputs["mask_features"].grad.isfinite().all()


def test_objects_that_no_query_is_left_for_have_no_mask_loss():
    outputs, (target,), packed = batch((9,))
    matched = torch.arange(QUERIES).expand(LAYERS, -1)
    matches = Matches(torch.zeros_like(matched), matched, matched)  # object 6 and later have no query
    tables = []
    for number in (None, 3, 6):
        masks = target.masks.clone()
        if number is not None:
            masks[number] = 255 - masks[number]
        changed = PackedTargets.pack([replace(target, masks=masks)])
        tables.append(MaskCriterion(CONFIG).losses(outputs, changed, matches, None)[0])
    assert {3, 6} <= set(packed.masked.tolist())
    assert torch.equal(tables[0], tables[2])
    assert not torch.allclose(tables[0], tables[1])


@pytest.mark.parametrize("name", ["mask_features", "layer_mask_embeddings"])
def test_non_finite_masks_name_their_image(name):
    outputs, _, packed = batch((2, 1))
    with torch.no_grad():
        outputs[name].select(0 if name == "mask_features" else 1, 1).fill_(float("nan"))
    assert SetCriterion(CONFIG)(outputs, packed).finite == [True, False]


class _LargestTensor(TorchDispatchMode):
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.size = max([self.size, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
        return result


def test_memory_does_not_depend_on_the_canvas():
    sizes = []
    for side in (16, 256):
        generator = torch.Generator().manual_seed(0)
        targets = PackedTargets.pack(random_targets([3, 4], 3, generator, masks=True))
        outputs = mask_outputs((3, 4), generator, (side, side))
        # Channels last, as the mask head returns it.
        features = outputs["mask_features"].detach().to(memory_format=torch.channels_last)
        outputs["mask_features"] = features.requires_grad_()
        criterion = SetCriterion(CONFIG)
        with _LargestTensor() as largest:
            criterion(outputs, targets)
        sizes.append(largest.size)
    assert sizes[0] == sizes[1]
    assert sizes[0] < 256 * 256


def test_losses_are_fp32_under_autocast():
    outputs, _, packed = batch()
    half = {name: value.bfloat16() if name == "layer_mask_embeddings" else value for name, value in outputs.items()}
    rounded = {name: value.bfloat16().float() if name == "layer_mask_embeddings" else value
               for name, value in outputs.items()}  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        first = SetCriterion(CONFIG)(half, packed)
    second = SetCriterion(CONFIG)(rounded, packed)
    assert first.total.dtype == torch.float32
    torch.testing.assert_close(first.total, second.total)


def test_nothing_waits_for_the_device_but_the_matcher(monkeypatch):
    outputs, _, packed = batch()
    copies = []
    for name in ("cpu", "item", "tolist", "__bool__", "nonzero"):
        wrapped = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, w=wrapped: copies.append(self.shape) or w(self))
    SetCriterion(CONFIG)(outputs, packed)
    assert copies == [(8 * LAYERS * QUERIES + 3,)], "the matching costs, and one flag per image"


# --- steps ------------------------------------------------------------------------------------------------------------


def shapes_batch(count=4):
    """Return a batch of one bright disk per image and its mask."""
    yy, xx = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    cell = (torch.arange(28) + 0.5) / 14 - 1
    disk = ((cell[:, None] ** 2 + cell[None] ** 2) < 1).to(torch.uint8) * 255
    samples = []
    for number in range(count):
        x, y, radius = 20 + 6 * number, 40 - 5 * number, 12 + 2 * number
        inside = (xx + 0.5 - x) ** 2 + (yy + 0.5 - y) ** 2 < radius**2
        pixels = torch.where(inside, 220, 60).to(torch.uint8).expand(3, -1, -1)
        box = torch.tensor([[x, y, 2 * radius, 2 * radius]]) / 64
        target = Target(torch.tensor([0]), box, number, (64, 64), disk[None], torch.tensor([True]))
        samples.append((pixels, target))
    return collate(samples)


def make(**train):
    torch.manual_seed(0)
    config = tiny_config(**train).updated({"model": {"masks": True}})
    return TrainStep(DeformableDETR(config.model).train(), config.train)


def test_masks_of_shapes_are_learned():
    images, targets = shapes_batch()
    train_step = make(lr=2e-3, num_denoising=10)
    for number in range(100):
        train_step.step([(images, targets)], number, 0.0)
    metrics = train_step.flush_pending_metrics()
    assert metrics is not None
    assert metrics.values["loss_dice"] < 0.15
    model = train_step.model.eval()
    with torch.no_grad():
        scored = postprocess(forward(model, images), [(64, 64)] * 4, top_k=1)
    for detection, (pixels, _) in zip(scored, zip(images.pixels, targets, strict=True), strict=True):
        assert detection.masks is not None
        (mask,) = decode_masks(detection.masks.to_rle((64, 64)), (64, 64))
        truth = pixels[0] > 128
        assert (mask & truth).sum() / (mask | truth).sum() > 0.85


@pytest.mark.parametrize("denoising", [0, 10])
def test_micro_batches_equal_one_batch(denoising):
    generator = torch.Generator().manual_seed(0)
    targets = random_targets([3, 1, 0, 4], 3, generator, masks=True)
    pixels = torch.randint(256, (4, 3, 64, 64), generator=generator, dtype=torch.uint8)
    samples = list(zip(pixels, targets, strict=True))
    torch.set_default_dtype(torch.float64)
    try:
        gradients = {}
        for name, parts, masks in (("one", [4], 6), ("two", [2, 2], 6), ("wrong", [2, 2], 3)):
            train_step = make(num_denoising=denoising)
            train_step.model.backbone.eval()
            first, batches = 0, []
            for size in parts:
                batches.append(collate(samples[first : first + size]))
                first += size
            stats = BatchStats.combine([count_objects(batches)])
            assert stats.masks == 6
            train_step.backward(batches, 0, replace(stats, masks=masks))
            gradients[name] = [p.grad for p in train_step.model.parameters() if p.requires_grad]
    finally:
        torch.set_default_dtype(torch.float32)
    differences = {
        name: max(float((a - b).abs().max()) for a, b in zip(gradients[name], gradients["one"], strict=True))
        for name in ("two", "wrong")
    }
    assert differences["two"] < 1e-10
    assert differences["wrong"] > 1e-4


def test_a_step_without_masks_has_gradients_for_all_parameters():
    images, targets = shapes_batch(2)
    boxes_only = [replace(target, masks=None, has_mask=None) for target in targets]
    train_step = make(num_denoising=10)
    train_step.step([(images, boxes_only)], 0, 0.0)
    metrics = train_step.flush_pending_metrics()
    assert metrics is not None
    assert metrics.values["loss_mask"] == metrics.values["loss_dice_denoising"] == 0
    missing = [name for name, p in train_step.model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_the_random_numbers_of_steps_without_masks_stay():
    """The points are drawn after everything else that a model without masks draws."""
    states = []
    for masks in (False, True):
        torch.manual_seed(0)
        config = tiny_config(num_denoising=10).updated({"model": {"masks": masks}})
        model = DeformableDETR(config.model).train()
        torch.manual_seed(1)  # after the mask head
        train_step = TrainStep(model, config.train)
        losses = train_step.backward([shapes_batch(2)])[1]
        states.append(dict(zip(losses.names, losses.values.tolist(), strict=True)))
    # The encoder's losses do not depend on masks, nor do the denoising queries' boxes.
    for name in ("loss_bbox_encoder", "loss_bbox_denoising", "loss_class_denoising"):
        assert states[0][name] == states[1][name]
