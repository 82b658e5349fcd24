"""Denoising queries: initial boxes and labels, attention mask and targets."""

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


def test_positive_queries_match_their_objects():
    torch.manual_seed(0)
    denoising = Denoising(TrainConfig(num_denoising=30, box_noise=0.0, label_noise=0.0), num_classes=3, dim=8)
    targets = [target(2, 1), target(0, 2), target(5, 3)]
    denoising_queries, (matches, groups) = denoising(PackedTargets.pack(targets), num_queries=4, max_objects=5)
    assert groups == 3
    assert denoising_queries.content.shape == (3, 3 * 2 * 5, 8)
    assert matches.image.shape == (1, 7 * 3)
    boxes, labels = torch.cat([t.boxes for t in targets]), torch.cat([t.labels for t in targets])
    for image, query, target_index in zip(matches.image[0], matches.query[0], matches.target[0], strict=True):
        assert torch.allclose(denoising_queries.reference_points[image, query], boxes[target_index], atol=1e-6)
        assert torch.equal(denoising_queries.content[image, query], denoising.classes.weight[labels[target_index]])
    assert len(set(zip(matches.image[0].tolist(), matches.query[0].tolist(), strict=True))) == 21
    assert not denoising_queries.content[1].any()  # the image without objects


def test_no_objects_give_no_queries():
    denoising = Denoising(TrainConfig(), num_classes=3, dim=8)
    assert denoising(PackedTargets.pack([target(0)]), num_queries=4, max_objects=0) == (None, None)


def test_at_least_one_group_if_objects_exceed_the_budget():
    denoising = Denoising(TrainConfig(num_denoising=10), num_classes=3, dim=8)
    _, (_, groups) = denoising(PackedTargets.pack([target(50)]), num_queries=4, max_objects=50)
    assert groups == 1


def test_noise_of_positive_and_negative_boxes():
    torch.manual_seed(0)
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2]).expand(1, 4000, 4)
    negative = torch.arange(4000) >= 2000
    noisy = noisy_boxes(boxes, negative, 1.0, BatchConsistentRng())
    overlap = box_iou(box_convert(boxes[0, :1], "cxcywh", "xyxy"), box_convert(noisy[0], "cxcywh", "xyxy"))[0]
    corners = box_convert(noisy[0], "cxcywh", "xyxy")
    displacement = (corners - torch.tensor([0.4, 0.4, 0.6, 0.6])).abs() / 0.1
    assert displacement[~negative].max() <= 1 + 1e-5
    assert overlap[~negative].mean() > 2 * overlap[negative].mean()
    assert (noisy[..., 2:] >= 0).all()
    inside = noisy_boxes(torch.tensor([[[0.05, 0.95, 0.1, 0.1]]]), torch.tensor([True]), 1.0, BatchConsistentRng())
    assert ((box_convert(inside, "cxcywh", "xyxy") >= 0) & (box_convert(inside, "cxcywh", "xyxy") <= 1)).all()


def test_label_noise_replaces_half_of_the_selected_labels():
    torch.manual_seed(0)
    labels = torch.full((1, 10000), 7)
    changed = (noisy_labels(labels, 1000, 0.5, BatchConsistentRng()) != 7).float().mean()
    assert 0.23 < changed < 0.27
    assert torch.equal(noisy_labels(labels, 1000, 0.0, BatchConsistentRng()), labels)


def test_attention_mask_isolates_groups():
    attn_mask = group_attn_mask(groups=2, size=3, num_queries=2)
    assert attn_mask.shape == (8, 8)
    assert not attn_mask[0, :3].any()
    assert attn_mask[0, 3:6].all()
    assert not attn_mask[0, 6:].any()
    assert attn_mask[6, :6].all()  # matching queries must not see denoising queries
    assert not attn_mask[6:, 6:].any()
