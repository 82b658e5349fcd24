"""The parts of the model: backbone, attention, positions, proposals."""

import math

import pytest
import torch
from torch import nn

from deformable_detr import UserError
from deformable_detr.config import presets
from deformable_detr.model.attention import DeformableAttention
from deformable_detr.model.backbone import Backbone, InputProjection
from deformable_detr.model.geometry import pixel_centers, proposal_anchors, refine_boxes
from deformable_detr.model.layers import inverse_sigmoid
from deformable_detr.model.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine

# -- attention


@pytest.mark.parametrize("heads", [1, 3, 6, 8])
def test_directions_are_spread_evenly_for_any_number_of_heads(heads):
    attention = DeformableAttention(dim=heads * 8, heads=heads, levels=2, points=3)
    attention.reset_parameters()
    rings = attention.sampling_offsets.bias.detach().view(heads, 2, 3, 2)
    for m in range(heads):
        angle = math.atan2(rings[m, 0, 0, 1], rings[m, 0, 0, 0]) % (2 * math.pi)
        assert angle == pytest.approx(2 * math.pi * m / heads, abs=1e-5)
        assert rings[m, 1, :, :].abs().amax(-1).tolist() == pytest.approx([1, 2, 3])


@pytest.mark.parametrize("coordinates", [2, 4])
def test_attention_reads_the_pixel_under_the_reference(coordinates):
    """With zero offsets every head reads the value at the reference: a map of x positions gives the reference's x."""
    attention = DeformableAttention(dim=8, heads=2, levels=1, points=4)
    attention.reset_parameters()
    for projection in (attention.value_proj, attention.output_proj):
        nn.init.eye_(projection.weight)
    nn.init.zeros_(attention.sampling_offsets.bias)
    h, w = 4, 10
    memory = ((torch.arange(w) + 0.5) / w).expand(h, w).reshape(1, h * w, 1).expand(-1, -1, 8).contiguous()
    reference = torch.tensor([[[0.25, 0.5], [0.7, 0.3]]])
    if coordinates == 4:
        reference = torch.cat((reference, torch.full((1, 2, 2), 0.2)), dim=-1)
    out, _ = attention(torch.randn(1, 2, 8), reference[:, :, None], memory, ((h, w),))
    assert torch.allclose(out[0, :, 0], torch.tensor([0.25, 0.7]), atol=1e-6)


def test_attention_reads_zero_where_there_is_padding():
    attention = DeformableAttention(dim=8, heads=2, levels=1, points=1)
    attention.reset_parameters()
    memory, reference = torch.randn(1, 9, 8), torch.full((1, 5, 1, 2), 0.5)
    query = torch.randn(1, 5, 8)
    masked, _ = attention(query, reference, memory, ((3, 3),), torch.ones(1, 9, dtype=torch.bool))
    seen, _ = attention(query, reference, memory, ((3, 3),), torch.zeros(1, 9, dtype=torch.bool))
    assert torch.equal(masked, torch.zeros_like(masked))
    assert seen.abs().sum() > 0


# -- positions


def test_sine_positions_do_not_depend_on_padding():
    position = PositionEmbeddingSine(32)
    mask = torch.zeros(1, 6, 8, dtype=torch.bool)
    padded = torch.ones(1, 10, 12, dtype=torch.bool)
    padded[:, :6, :8] = False
    small, large = position(mask, torch.float32), position(padded, torch.float32)
    assert torch.allclose(small, large[:, :, :6, :8], atol=1e-6)
    assert small.flatten(2).unique(dim=2).shape[2] == 48  # every pixel has its own


def test_learned_positions_grow_beyond_their_table():
    position = PositionEmbeddingLearned(8, size=5)
    small = position(torch.zeros(1, 5, 5, dtype=torch.bool), torch.float32)
    large = position(torch.zeros(1, 7, 9, dtype=torch.bool), torch.float32)
    assert large.shape == (1, 8, 7, 9)
    assert torch.allclose(large[..., 0, 0], small[..., 0, 0])
    assert torch.allclose(large[..., -1, -1], small[..., -1, -1])


def test_pixel_centers_are_relative_to_the_unpadded_image():
    centers = pixel_centers(((2, 4),), torch.tensor([[[0.5, 1.0]]]))
    assert centers[0, :4, 0].tolist() == [0.25, 0.75, 1.25, 1.75]
    assert centers[0, ::4, 1].tolist() == [0.25, 0.75]


# -- boxes


def test_refinement_starts_from_points_and_boxes():
    start = torch.tensor([[0.3, 0.6, 0.2, 0.1]])
    assert torch.allclose(refine_boxes(torch.zeros(1, 4), start), start, atol=1e-6)
    assert refine_boxes(torch.zeros(1, 4), start[:, :2])[0].tolist() == pytest.approx([0.3, 0.6, 0.5, 0.5])


def test_inverse_sigmoid_is_finite_at_the_ends_in_half_precision():
    values = inverse_sigmoid(torch.tensor([0.0, 1e-7, 0.5, 1.0], dtype=torch.float16))
    assert values.dtype == torch.float32
    assert values.isfinite().all()


def test_proposals_double_in_size_and_avoid_border_and_padding():
    mask = torch.zeros(1, 16 + 4, dtype=torch.bool)
    mask[0, 3] = True
    anchors, usable = proposal_anchors(((4, 4), (2, 2)), torch.ones(1, 2, 2), mask)
    boxes = anchors.sigmoid()
    assert boxes[0, 0].tolist() == pytest.approx([0.125, 0.125, 0.05, 0.05])
    assert boxes[0, 16].tolist() == pytest.approx([0.25, 0.25, 0.1, 0.1])
    assert usable[0].tolist() == [True] * 3 + [False] + [True] * 16
    assert anchors[0, 3].isinf().all()
    _, on_border = proposal_anchors(((1, 200),), torch.ones(1, 1, 2), None)
    assert on_border[0, 1].item() is False
    assert on_border[0, 2].item() is True


# -- backbone


def backbone(**changes) -> Backbone:
    return Backbone(presets.multi_scale(**{"backbone": "resnet10t", "backbone_weights": "none", **changes}))


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 6])
def test_levels_halve_from_stride_8_on(levels):
    body = backbone(num_feature_levels=levels)
    project = InputProjection(presets.multi_scale(hidden_dim=64, num_heads=4, num_feature_levels=levels), body.channels)
    sizes = [x.shape[-1] for x in project(body(torch.randn(1, 3, 256, 256)))]
    first = {1: 32, 2: 16}.get(levels, 8)
    assert sizes == [256 // (first * 2**i) for i in range(levels)]


def test_one_small_image_trains_a_backbone_whose_norms_learn():
    body = backbone().train()
    norms = [module for module in body.modules() if isinstance(module, nn.BatchNorm2d)]
    maps = body(torch.randn(1, 3, 32, 32))
    assert maps[-1].shape[2:] == (1, 1)
    maps[-1].sum().backward()
    assert all(norm.training for norm in norms)
    before = norms[0].running_mean.clone()
    body(torch.randn(2, 3, 32, 32))
    assert not torch.equal(norms[0].running_mean, before), "two images are a batch"


def test_dc5_keeps_stride_16():
    body = Backbone(presets.single_scale_dc5(backbone="resnet18", backbone_weights="none"))
    assert body(torch.randn(1, 3, 128, 128))[0].shape[-1] == 8


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "mobilenetv4_conv_small_050", "convnext_atto"])
def test_frozen_stages_get_no_gradient_and_the_rest_does(name):
    body = backbone(backbone=name, frozen_stages=2)
    sum(x.sum() for x in body(torch.randn(1, 3, 64, 64))).backward()
    frozen = [n for n, p in body.named_parameters() if not p.requires_grad]
    free = [n for n, p in body.named_parameters() if p.requires_grad]
    assert frozen
    assert free
    every = [n for n, _ in body.named_parameters()]
    assert every[: len(frozen)] == frozen  # the first ones, without a hole
    assert all(p.grad is not None for p in body.parameters() if p.requires_grad)


def test_norms_are_frozen_with_weights_and_trained_without():
    trained = [m for m in backbone().modules() if isinstance(m, nn.BatchNorm2d)]
    assert trained
    frozen = backbone(backbone_norm="frozen").train()
    assert not [m for m in frozen.modules() if isinstance(m, nn.BatchNorm2d)]
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    frozen(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())


def test_weights_from_a_file(tmp_path):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    source = timm.create_model("resnet10t")
    save_file(source.state_dict(), tmp_path / "resnet10t.safetensors")
    body = backbone(backbone_weights=str(tmp_path / "resnet10t.safetensors"))
    assert torch.equal(body.body.layer4[0].conv1.weight, source.layer4[0].conv1.weight)
    with pytest.raises(UserError, match=r"resnet10t\.safetensors are not those of timm's 'resnet18'"):
        backbone(backbone="resnet18", backbone_weights=str(tmp_path / "resnet10t.safetensors"))
    with pytest.raises(UserError, match=r"resnet10t\.safetensors are not those"):
        backbone(backbone="tf_efficientnet_lite0", backbone_weights=str(tmp_path / "resnet10t.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"broken\.safetensors"):
        backbone(backbone_weights=str(tmp_path / "broken.safetensors"))
    with pytest.raises(UserError, match=r"missing\.safetensors"):
        backbone(backbone_weights=str(tmp_path / "missing.safetensors"))


def test_the_shared_efficientnet_loads(shared):
    path = shared / "weights" / "tf_efficientnet_lite0.timm.fp32.safetensors"
    body = backbone(backbone="tf_efficientnet_lite0", backbone_weights=str(path))
    assert body.channels == (40, 112, 320)
    assert not any(p.requires_grad for p in body.body.conv_stem.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "resnet5000"}, "'resnet5000' is no timm model"),
        ({"backbone": "vit_tiny_patch16_224"}, "strides|feature maps"),
        ({"frozen_stages": 9}, "frozen_stages 9"),
    ],
)
def test_a_wrong_backbone_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        backbone(**changes)
