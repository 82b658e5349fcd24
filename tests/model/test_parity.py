"""Numerical parity with transformers' implementation, in both directions."""

import itertools

import pytest
import torch

from deformable_detr import DeformableDETR
from deformable_detr.config import presets
from deformable_detr.weights import transformers_format
from tests.support.parity import VARIANTS, compare, randomized, transformers, transformers_config

TINY_FIELDS = {
    "backbone": "test_resnet", "backbone_weights": "none", "hidden_dim": 64, "num_heads": 4, "ffn_dim": 48,
    "encoder_layers": 2, "decoder_layers": 3, "num_queries": 20, "num_classes": 5,
}  # fmt: skip
PRESETS = [name for name in presets.PRESETS if not name.startswith(("small", "dino"))]  # transformers has no DINO
CASES = [
    *((variant, levels, "timm") for variant, levels in itertools.product(VARIANTS, (1, 4))),
    ("plain", 1, "own ResNet"), ("refine", 4, "own ResNet"),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "levels", "backbone"), CASES, ids=lambda value: str(value))
def test_transformers_weights_give_equal_outputs(variant, levels, backbone, tmp_path):
    theirs = randomized(transformers.DeformableDetrForObjectDetection(transformers_config(variant, levels, backbone)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = DeformableDETR.from_pretrained(tmp_path / "theirs")
    transformers_format.save(ours, tmp_path / "back")
    exported, report = transformers.AutoModelForObjectDetection.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(report.values()), report
    for dtype in (torch.float32, torch.float64):
        compare(theirs, ours, dtype)
        compare(exported.eval(), ours, dtype)


SHAPES = {
    "bottleneck": {"hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1]},
    "basic": {"layer_type": "basic", "embedding_size": 12, "hidden_sizes": [12, 16, 24, 32], "depths": [1, 2, 1, 1]},
    "strides first": {"hidden_sizes": [16, 32, 64, 128], "depths": [2, 1, 1, 2], "downsample_in_bottleneck": True},
    "gelu": {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "hidden_act": "gelu"},
}


@pytest.mark.parametrize(("shape", "levels"), [*((shape, 4) for shape in SHAPES), ("basic", 1)])
def test_custom_resnet_round_trip(shape, levels, tmp_path):
    stages = ["stage2", "stage3", "stage4"] if levels > 1 else ["stage4"]
    backbone = transformers.ResNetConfig(**SHAPES[shape], out_features=stages)
    theirs = transformers_config("refine", levels, "own ResNet", backbone_config=backbone)
    theirs = randomized(transformers.DeformableDetrForObjectDetection(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = DeformableDETR.from_pretrained(tmp_path / "theirs")
    transformers_format.save(ours, tmp_path / "back")
    exported = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "back")
    state = theirs.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in exported.state_dict().items())
    for dtype in (torch.float32, torch.float64):
        compare(theirs, ours, dtype)
        compare(exported.eval(), ours, dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dilated_backbone(variant, tmp_path):
    theirs = randomized(
        transformers.DeformableDetrForObjectDetection(transformers_config(variant, 1, dilation=True)), seed=1
    )
    theirs.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.float64):
        compare(theirs, DeformableDETR.from_pretrained(tmp_path), dtype)


@pytest.mark.parametrize("name", [*PRESETS, "activations in the norms"])
def test_exported_weights_give_equal_outputs_in_transformers(name, tmp_path):
    torch.manual_seed(0)
    changes = {**TINY_FIELDS, "backbone": "tf_efficientnet_lite0"} if name not in PRESETS else TINY_FIELDS
    ours = randomized(DeformableDETR(presets.PRESETS.get(name, presets.two_stage)(**changes)))
    transformers_format.save(ours, tmp_path)
    theirs, report = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    for dtype in (torch.float32, torch.float64):
        compare(theirs.eval(), ours, dtype)


def test_silu_gelu_and_learned_positions(tmp_path):
    for activation, position in (("silu", "learned"), ("gelu", "sine")):
        changes = {"activation_function": activation, "position_embedding_type": position}
        theirs = transformers.DeformableDetrForObjectDetection(transformers_config("plain", 3, **changes))
        randomized(theirs).save_pretrained(tmp_path / activation)
        compare(theirs, DeformableDETR.from_pretrained(tmp_path / activation), torch.float64, width=200)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PRESETS, "small-portable"])
def test_full_size(name, tmp_path):
    torch.manual_seed(0)
    ours = randomized(DeformableDETR(presets.PRESETS[name](backbone_weights="none")))
    transformers_format.save(ours, tmp_path)
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path)
    compare(theirs.eval(), ours, torch.float32)
    compare(theirs, DeformableDETR.from_pretrained(tmp_path), torch.float64)
