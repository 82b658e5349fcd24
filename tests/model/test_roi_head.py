"""The RoI head: what it samples, what it refines, and that padding does not reach it."""

import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_convert, roi_align

from deformable_detr import DeformableDETR
from deformable_detr.config import presets
from deformable_detr.model.roi_head import MAX_LOG_SCALE, STEP, grid_points, refine_in_box, sample

from .test_network import TINY, batch, perturbed, tiny


def test_samples_equal_roi_align_with_one_sample_per_cell():
    torch.manual_seed(0)
    value = torch.randn(2, 24, 32, 6)
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.3], [0.3, 0.6, 0.2, 0.5]], [[0.6, 0.4, 0.5, 0.5], [0.5, 0.5, 0.9, 0.9]]])
    ours = sample(value, grid_points(boxes, 5)).view(2, 2, 5, 5, 6)
    low, size = boxes[..., :2] - boxes[..., 2:] / 2, torch.tensor([32.0, 24.0])
    corners = torch.cat([low * size, (low + boxes[..., 2:]) * size], dim=-1)
    maps = value.permute(0, 3, 1, 2).contiguous()
    theirs = roi_align(maps, list(corners), 5, sampling_ratio=1, aligned=True).view(2, 2, 6, 5, 5)
    assert torch.allclose(ours, theirs.permute(0, 1, 3, 4, 2), atol=1e-5)


def test_boxes_are_refined_as_in_r_cnn():
    torch.manual_seed(0)
    boxes, deltas = torch.rand(50, 4) + 0.01, 3 * torch.randn(50, 4)
    deltas[0, 2:] = 100.0  # no infinite boxes
    coder = BoxCoder((1 / STEP, 1 / STEP, 0.5 / STEP, 0.5 / STEP), bbox_xform_clip=MAX_LOG_SCALE)
    expected = coder.decode_single(deltas, box_convert(boxes, "cxcywh", "xyxy"))
    refined = refine_in_box(deltas, boxes)
    assert torch.allclose(refined, box_convert(expected, "xyxy", "cxcywh").clamp(0, 1), atol=1e-5)
    assert (refined < 1).float().mean() > 0.8


def test_padding_changes_nothing():
    model = perturbed(tiny(presets.small, num_queries=4)).eval()
    assert model.roi_head is not None
    pixels, _ = batch(sizes=((96, 128),))
    padded, mask = torch.randn(1, 3, 128, 192), torch.ones(1, 128, 192, dtype=torch.bool)
    padded[:, :, :96, :128], mask[:, :96, :128] = pixels, False
    stride4 = torch.randn(1, 64, 24, 32)
    map_padded = torch.nn.functional.pad(stride4, (0, 16, 0, 8), value=3.0)
    boxes, queries = torch.rand(1, 4, 4), torch.randn(1, 4, 64)
    alone = model.roi_head(stride4, None, queries, boxes, torch.ones(1, 2))
    ratios = torch.tensor([[32 / 48, 24 / 32]])
    mask4 = torch.ones(1, 32, 48, dtype=torch.bool)
    mask4[:, :24, :32] = False
    assert torch.allclose(alone, model.roi_head(map_padded, mask4, queries, boxes, ratios), atol=1e-5)
    assert not torch.allclose(alone, model.roi_head(map_padded, None, queries, boxes, ratios), atol=1e-2)


def test_it_starts_with_the_boxes_of_the_last_layer_and_trains_class_and_box():
    model = tiny(presets.small)
    outputs = model(*batch())
    assert torch.allclose(outputs["layer_boxes"][-1], outputs["layer_boxes"][-2], atol=1e-6)
    assert not torch.allclose(outputs["layer_logits"][-1], outputs["layer_logits"][-2])
    (outputs["pred_logits"].sum() + outputs["pred_boxes"].sum()).backward()
    heads = model.decoder.heads
    assert heads.classes[heads.last].weight.grad.abs().sum() > 0
    assert heads.boxes[heads.last].layers[-1].weight.grad.abs().sum() > 0
    assert heads.boxes[1].layers[-1].weight.grad is None or not heads.boxes[1].layers[-1].weight.grad.any()
    assert model.backbone.body.conv1[0].weight.grad.abs().sum() > 0


def test_without_it_nothing_changes():
    torch.manual_seed(0)
    plain = DeformableDETR(presets.small(**TINY, roi_grid=0))
    torch.manual_seed(0)
    with_head = DeformableDETR(presets.small(**TINY))
    assert not any("roi_head" in name for name in plain.state_dict())
    state = with_head.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, state[name]), name
    more = sum(p.numel() for p in with_head.parameters()) - sum(p.numel() for p in plain.parameters())
    assert more > 0
