"""The mask head: shapes, its start, and that it changes nothing else."""

import pytest
import torch

from deformable_detr import DeformableDETR
from deformable_detr.config import presets
from deformable_detr.config.detector import DetectorConfig
from deformable_detr.config.schema import ModelConfig
from deformable_detr.model.decoder import DenoisingQueries
from deformable_detr.model.mask_ops import select_masks
from tests.support.models import tiny

TINY = {
    "backbone": "test_resnet", "backbone_weights": "none", "hidden_dim": 32, "num_heads": 4, "ffn_dim": 48,
    "encoder_layers": 1, "decoder_layers": 2, "num_queries": 20, "num_classes": 3,
}  # fmt: skip
SWIN = {"backbone": "swin_tiny_patch4_window7_224", "hidden_dim": 32}


def build(name, **changes):
    torch.manual_seed(0)
    options = {**TINY, **(SWIN if name == "dino-swin-l" else {}), **changes}
    return DeformableDETR(presets.PRESETS[name](**options))


def pixels(batch=2, height=66, width=96):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", sorted(set(presets.PRESETS) - {"small-masks"}))
def test_everything_else_is_as_without_masks(name):
    boxes, masks = build(name).eval(), build(name, masks=True).eval()
    states = boxes.state_dict(), masks.state_dict()
    assert list(states[0]) == [key for key in states[1] if not key.startswith("mask_head.")]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    with torch.no_grad():
        expected, outputs = boxes(pixels()), masks(pixels())
    assert expected.keys() == outputs.keys() - {"mask_embeddings", "mask_features"}
    assert all(torch.equal(value, outputs[key]) for key, value in expected.items())


def test_comparison_detects_another_order():
    """Of the parts that draw random numbers, the mask head is the last."""
    torch.manual_seed(0)
    torch.rand(1)
    later = DeformableDETR(presets.small(**TINY)).state_dict()
    first = build("small").state_dict()
    assert not all(torch.equal(value, later[key]) for key, value in first.items())


@pytest.mark.parametrize(
    ("name", "changes"),
    [("small", {}), ("single-scale", {}), ("single-scale-dc5", {"backbone": "resnet18"}), ("dino-5scale", {}),
     ("dino-swin-l", {}), ("small", {"num_feature_levels": 2}), ("small", {"num_feature_levels": 3})],
)  # fmt: skip
def test_masks_have_stride_4(name, changes):
    model = build(name, masks=True, **changes).eval()
    with torch.no_grad():
        outputs = model(pixels())
    assert outputs["mask_features"].shape == (2, 21, 17, 24)  # 66 × 96 pixels
    assert outputs["mask_embeddings"].shape == (2, 20, 21)
    assert select_masks(outputs, torch.tensor([[3, 1], [0, 2]])).shape == (2, 2, 17, 24)


def test_a_resnet_of_any_shape():
    model = tiny(masks=True)
    with torch.no_grad():
        assert model(pixels(1))["mask_features"].shape == (1, 13, 17, 24)


@pytest.mark.parametrize("name", ["small", "single-scale"])
def test_both_inputs_reach_the_masks(name):
    model = build(name, masks=True).eval()
    head = model.mask_head
    assert head is not None
    stride4 = torch.randn(1, head.lateral.in_features, 16, 24)
    memory = torch.randn(1, 8 * 12 + 24, 32)
    whole = (8, 12), torch.ones(1, 2)
    features = head.features(stride4, memory, *whole)
    assert not torch.equal(features, head.features(stride4 + 1, memory, *whole))
    assert not torch.equal(features, head.features(stride4, memory + torch.randn(32), *whole))
    coarse = memory.clone()
    coarse[:, 96:] = 0
    assert torch.equal(features, head.features(stride4, coarse, *whole)), "only the finest level"


def test_masks_start_as_ellipses_in_their_boxes():
    model = build("small", masks=True).eval()
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[1, 32:] = padding[1, :, 64:] = True
    head = model.mask_head
    assert head is not None
    with torch.no_grad():
        outputs = model(pixels(height=64), padding)
        boxes = outputs["pred_boxes"]
        logits = select_masks(outputs, torch.arange(20).expand(2, -1))
    for image, (height, width) in enumerate([(16, 24), (8, 16)]):  # cells of the image
        y, x = ((torch.arange(side) + 0.5) / side for side in (height, width))
        cx, cy, w, h = boxes[image, :, :, None, None].unbind(1)
        expected = 1.2 - ((x - cx) / (w / 2)) ** 2 - ((y[:, None] - cy) / (h / 2)) ** 2
        torch.testing.assert_close(logits[image, :, :height, :width], expected, atol=1e-2, rtol=1e-3)


def test_boxes_get_no_gradient_from_masks():
    boxes = torch.rand(3, 4, requires_grad=True)
    embeddings = build("small", masks=True).mask_head.embeddings(torch.randn(3, 32), boxes)
    assert embeddings.requires_grad
    assert torch.autograd.grad(embeddings.sum(), boxes, allow_unused=True) == (None,)


def test_training_returns_the_embeddings_of_all_layers():
    model = build("small", masks=True).train()
    queries = DenoisingQueries(torch.randn(2, 6, 32), torch.full((2, 6, 4), 0.4), torch.zeros(26, 26, dtype=torch.bool))
    outputs = model(pixels(), denoising_queries=queries)
    assert outputs["layer_mask_embeddings"].shape == (3, 2, 20, 21)  # two decoder layers and the RoI head
    assert outputs["denoising_mask_embeddings"].shape == (3, 2, 6, 21)
    assert torch.equal(outputs["mask_embeddings"], outputs["layer_mask_embeddings"][-1])
    assert "denoising_mask_embeddings" not in model(pixels())


@pytest.mark.parametrize("name", ["small", "two-stage"])
def test_the_head_reads_the_normed_outputs(name):
    model = build(name, masks=True, pre_norm=True).eval()
    read = []
    assert model.mask_head is not None
    model.mask_head.embed.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    normed = []
    last = model.decoder.norm if model.roi_head is None else model.roi_head
    last.register_forward_hook(lambda _, __, output: normed.append(output))
    with torch.no_grad():
        model(pixels())
    assert torch.equal(read[0], normed[-1])


def test_masks_are_off_unless_asked_for():
    assert not DetectorConfig().masks
    assert [name for name in presets.PRESETS if presets.PRESETS[name]().masks] == ["small-masks"]
    assert presets.config("small-masks").train == presets.config("small").train
    assert presets.small_masks() == presets.small(masks=True)
    assert ModelConfig.from_dict({}).masks is False
