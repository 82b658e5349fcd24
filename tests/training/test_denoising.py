"""Denoising queries: what they start from, whom they see, what they should find."""

import torch
from torchvision.ops import box_iou
from torchvision.ops.boxes import box_convert

from deformable_detr import TrainConfig
from deformable_detr.structures import Target
from deformable_detr.training.denoising import BatchConsistentRng, Denoising, group_attn_mask, noisy_boxes, noisy_labels
from deformable_detr.training.matcher import PackedTargets


def target(count: int, seed: int = 0) -> Target:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 4, generator=generator) * 0.2 + 0.3
    return Target(torch.arange(count) % 3, boxes, image_id=seed, original_size=(100, 100))


def test_each_near_query_belongs_to_its_object():
    torch.manual_seed(0)
    denoising = Denoising(TrainConfig(num_denoising=30, box_noise=0.0, label_noise=0.0), num_classes=3, dim=8)
    targets = [target(2, 1), target(0, 2), target(5, 3)]
    extra, (matches, groups) = denoising(PackedTargets.pack(targets), num_queries=4, max_objects=5)
    assert groups == 3
    assert extra.queries.shape == (3, 3 * 2 * 5, 8)
    assert matches.image.shape == (1, 7 * 3)
    boxes, labels = torch.cat([t.boxes for t in targets]), torch.cat([t.labels for t in targets])
    for image, query, wanted in zip(matches.image[0], matches.query[0], matches.target[0], strict=True):
        assert torch.allclose(extra.boxes[image, query], boxes[wanted], atol=1e-6)
        assert torch.equal(extra.queries[image, query], denoising.classes.weight[labels[wanted]])
    assert len(set(zip(matches.image[0].tolist(), matches.query[0].tolist(), strict=True))) == 21
    assert not extra.queries[1].any()  # nothing to find in the image without objects


def test_no_objects_no_queries():
    denoising = Denoising(TrainConfig(), num_classes=3, dim=8)
    assert denoising(PackedTargets.pack([target(0)]), num_queries=4, max_objects=0) == (None, None)


def test_more_objects_than_the_budget_still_make_one_group():
    denoising = Denoising(TrainConfig(num_denoising=10), num_classes=3, dim=8)
    _, (_, groups) = denoising(PackedTargets.pack([target(50)]), num_queries=4, max_objects=50)
    assert groups == 1


def test_near_boxes_stay_near_and_far_ones_do_not():
    torch.manual_seed(0)
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2]).expand(1, 4000, 4)
    far = torch.arange(4000) >= 2000
    noisy = noisy_boxes(boxes, far, 1.0, BatchConsistentRng())
    overlap = box_iou(box_convert(boxes[0, :1], "cxcywh", "xyxy"), box_convert(noisy[0], "cxcywh", "xyxy"))[0]
    corners = box_convert(noisy[0], "cxcywh", "xyxy")
    moved = (corners - torch.tensor([0.4, 0.4, 0.6, 0.6])).abs() / 0.1
    assert moved[~far].max() <= 1 + 1e-5
    assert overlap[~far].mean() > 2 * overlap[far].mean()
    assert (noisy[..., 2:] >= 0).all()
    inside = noisy_boxes(torch.tensor([[[0.05, 0.95, 0.1, 0.1]]]), torch.tensor([True]), 1.0, BatchConsistentRng())
    assert ((box_convert(inside, "cxcywh", "xyxy") >= 0) & (box_convert(inside, "cxcywh", "xyxy") <= 1)).all()


def test_half_of_the_label_noise_is_drawn_anew():
    torch.manual_seed(0)
    labels = torch.full((1, 10000), 7)
    changed = (noisy_labels(labels, 1000, 0.5, BatchConsistentRng()) != 7).float().mean()
    assert 0.23 < changed < 0.27
    assert torch.equal(noisy_labels(labels, 1000, 0.0, BatchConsistentRng()), labels)


def test_groups_see_themselves_and_the_models_queries_only():
    attn_mask = group_attn_mask(groups=2, size=3, num_queries=2)
    assert attn_mask.shape == (8, 8)
    assert not attn_mask[0, :3].any()
    assert attn_mask[0, 3:6].all()
    assert not attn_mask[0, 6:].any()
    assert attn_mask[6, :6].all()  # the model's own must not peek at the truth
    assert not attn_mask[6:, 6:].any()
