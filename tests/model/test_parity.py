"""The detector against transformers' implementation: the same weights give the same logits and boxes."""

import itertools

import pytest
import torch

from deformable_detr import DeformableDETR
from deformable_detr.config import presets
from deformable_detr.weights import transformers_format

transformers = pytest.importorskip("transformers")

VARIANTS = {"plain": (False, False), "refine": (True, False), "two-stage": (True, True)}
BACKBONES = {"timm": {"backbone": "test_resnet"}, "own ResNet": {"use_timm_backbone": False}}
TINY = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 20, "two_stage_num_proposals": 20,
    "num_labels": 5,
}  # fmt: skip


def config(variant: str, levels: int, backbone: str = "timm", **changes):
    refine, two_stage = VARIANTS[variant]
    values = {**TINY, **BACKBONES[backbone], "with_box_refine": refine, "two_stage": two_stage, **changes}
    if backbone == "own ResNet" and "backbone_config" not in values:
        stages = ["stage2", "stage3", "stage4"] if levels > 1 else ["stage4"]
        values["backbone_config"] = transformers.ResNetConfig(
            layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], out_features=stages
        )
    return transformers.DeformableDetrConfig(num_feature_levels=levels, **values)


@torch.no_grad()
def randomized(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every weight, norm, bias, offset and running statistic moved, so that nothing is equal by being at its start.

    As calm as trained weights are: wilder ones amplify the rounding of fp32 in both implementations beyond 1e-5.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.copy_(noise.abs() + 0.5)
        elif "sampling_offsets" in name:
            value.copy_(noise * (0.02 if value.ndim > 1 else 2.0))
        elif value.ndim > 1:
            gain = 1.0 if value.ndim == 4 or "bbox_embed" in name or "heads.boxes" in name else 0.6
            value.copy_(noise * gain / value[0].numel() ** 0.5)
        else:
            value.copy_(noise * 0.2 + (name.endswith("weight") and value.mean().item() == 1))
    return model.eval()


def batch(dtype=torch.float32, width=416):
    """Three sizes on one canvas; 400 pixels are 50 tokens, whose outermost lie at exactly 1% of the image."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.zeros(3, 3, 64, width, dtype=dtype)
    mask = torch.ones(3, 64, width, dtype=torch.bool)
    for i, (h, w) in enumerate([(64, min(400, width)), (50, width), (40, 150)]):
        pixels[i, :, :h, :w] = torch.randn(3, h, w, generator=generator, dtype=dtype)
        mask[i, :h, :w] = False
    return pixels, mask


@torch.no_grad()
def compare(theirs, ours: DeformableDETR, dtype: torch.dtype, width: int = 416) -> None:
    """All outputs that both have: of every decoder layer, and of the encoder's proposals."""
    pixels, mask = batch(dtype, width)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    there, here = theirs.to(dtype)(pixels, pixel_mask=(~mask).long()), ours.to(dtype)(pixels, mask)
    assert here["pred_logits"].dtype == dtype
    pairs = {"logits": (there.logits, here["pred_logits"]), "boxes": (there.pred_boxes, here["pred_boxes"])}
    hidden, references = there.intermediate_hidden_states, there.intermediate_reference_points
    for layer in range(hidden.shape[1]):
        logits = theirs.class_embed[layer](hidden[:, layer])
        pairs[f"logits of layer {layer}"] = (logits, here["layer_logits"][layer])
        if theirs.config.with_box_refine:
            pairs[f"boxes of layer {layer}"] = (references[:, layer], here["layer_boxes"][layer])
    if theirs.config.two_stage:
        pairs["proposals' logits"] = (there.enc_outputs_class, here["encoder_logits"])
        pairs["proposals' boxes"] = (there.enc_outputs_coord_logits.sigmoid(), here["encoder_boxes"])
    for name, (expected, actual) in pairs.items():
        assert (actual - expected).abs().max() <= tolerance, name
    assert there.logits.std() > 0.1  # what is compared is not constant
    assert there.pred_boxes.std(dim=(0, 1)).max() > 0.005


def loaded(folder) -> DeformableDETR:
    _, state, model = transformers_format.load(folder)
    model.load_state_dict(state)
    return model.eval()


CASES = [*itertools.product(VARIANTS, (1, 4), BACKBONES)]


@pytest.mark.parametrize(("variant", "levels", "backbone"), CASES, ids=lambda value: str(value))
def test_weights_of_transformers_give_the_same_here(variant, levels, backbone, tmp_path):
    theirs = randomized(transformers.DeformableDetrForObjectDetection(config(variant, levels, backbone)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = loaded(tmp_path / "theirs")
    transformers_format.save(ours, tmp_path / "back")
    back, report = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    for dtype in (torch.float32, torch.float64):
        compare(theirs, ours, dtype)
        compare(back.eval(), ours, dtype)


SHAPES = {
    "bottleneck": {"hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1]},
    "basic": {"layer_type": "basic", "embedding_size": 12, "hidden_sizes": [12, 16, 24, 32], "depths": [1, 2, 1, 1]},
    "strides first": {"hidden_sizes": [16, 32, 64, 128], "depths": [2, 1, 1, 2], "downsample_in_bottleneck": True},
    "gelu": {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "hidden_act": "gelu"},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("levels", [1, 4])
def test_own_resnet_of_any_size_there_and_back(shape, levels, tmp_path):
    stages = ["stage2", "stage3", "stage4"] if levels > 1 else ["stage4"]
    backbone = transformers.ResNetConfig(**SHAPES[shape], out_features=stages)
    theirs = config("refine", levels, "own ResNet", backbone_config=backbone)
    theirs = randomized(transformers.DeformableDetrForObjectDetection(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = loaded(tmp_path / "theirs")
    transformers_format.save(ours, tmp_path / "back")
    back = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "back")
    state = theirs.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in back.state_dict().items())
    for dtype in (torch.float32, torch.float64):
        compare(theirs, ours, dtype)
        compare(back.eval(), ours, dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dilated_backbone(variant, tmp_path):
    theirs = randomized(transformers.DeformableDetrForObjectDetection(config(variant, 1, dilation=True)), seed=1)
    theirs.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.float64):
        compare(theirs, loaded(tmp_path), dtype)


OURS = {
    "backbone": "test_resnet", "backbone_weights": "none", "hidden_dim": 64, "num_heads": 4, "ffn_dim": 48,
    "encoder_layers": 2, "decoder_layers": 3, "num_queries": 20, "num_classes": 5,
}  # fmt: skip


PAPER = [name for name in presets.PRESETS if not name.startswith("small")]


@pytest.mark.parametrize("name", [*PAPER, "activations in the norms"])
def test_weights_from_here_give_the_same_in_transformers(name, tmp_path):
    torch.manual_seed(0)
    changes = {**OURS, "backbone": "tf_efficientnet_lite0"} if name not in PAPER else OURS
    ours = randomized(DeformableDETR(presets.PRESETS.get(name, presets.two_stage)(**changes)))
    transformers_format.save(ours, tmp_path)
    theirs, report = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    for dtype in (torch.float32, torch.float64):
        compare(theirs.eval(), ours, dtype)


def test_silu_gelu_and_learned_positions(tmp_path):
    for activation, position in (("silu", "learned"), ("gelu", "sine")):
        changes = {"activation_function": activation, "position_embedding_type": position}
        theirs = transformers.DeformableDetrForObjectDetection(config("plain", 3, **changes))
        randomized(theirs).save_pretrained(tmp_path / activation)
        compare(theirs, loaded(tmp_path / activation), torch.float64, width=200)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PAPER, "small-portable"])
def test_full_size(name, tmp_path):
    torch.manual_seed(0)
    ours = randomized(DeformableDETR(presets.PRESETS[name](backbone_weights="none")))
    transformers_format.save(ours, tmp_path)
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path)
    compare(theirs.eval(), ours, torch.float32)
    compare(theirs, loaded(tmp_path), torch.float64)
