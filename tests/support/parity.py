"""Transformers' Deformable DETR as the reference: small models, a padded batch and a comparison of outputs."""

import pytest
import torch

from deformable_detr import DeformableDETR

transformers = pytest.importorskip("transformers")

VARIANTS = {"plain": (False, False), "refine": (True, False), "two-stage": (True, True)}
BACKBONES = {"timm": {"backbone": "test_resnet"}, "own ResNet": {"use_timm_backbone": False}}
TINY = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 20, "two_stage_num_proposals": 20,
    "num_labels": 5,
}  # fmt: skip


def transformers_config(variant: str, levels: int, backbone: str = "timm", **changes):
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
    """Randomize every parameter and running statistic, so that nothing is equal because of its initial value.

    Magnitudes are those of trained weights; larger ones amplify fp32 rounding beyond 1e-5 in both implementations.
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
    """Return three image sizes on one canvas; 400 pixels are 50 tokens, the outermost exactly 1% inside the image."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.zeros(3, 3, 64, width, dtype=dtype)
    mask = torch.ones(3, 64, width, dtype=torch.bool)
    for i, (h, w) in enumerate([(64, min(400, width)), (50, width), (40, 150)]):
        pixels[i, :, :h, :w] = torch.randn(3, h, w, generator=generator, dtype=dtype)
        mask[i, :h, :w] = False
    return pixels, mask


@torch.no_grad()
def compare(theirs, ours: DeformableDETR, dtype: torch.dtype, width: int = 416) -> None:
    """Compare all outputs that both have: every decoder layer and the encoder proposals."""
    pixels, mask = batch(dtype, width)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    reference, outputs = theirs.to(dtype)(pixels, pixel_mask=(~mask).long()), ours.to(dtype)(pixels, mask)
    assert outputs["pred_logits"].dtype == dtype
    pairs = {
        "logits": (reference.logits, outputs["pred_logits"]),
        "boxes": (reference.pred_boxes, outputs["pred_boxes"]),
    }
    hidden, references = reference.intermediate_hidden_states, reference.intermediate_reference_points
    for layer in range(hidden.shape[1]):
        logits = theirs.class_embed[layer](hidden[:, layer])
        pairs[f"logits of layer {layer}"] = (logits, outputs["layer_logits"][layer])
        if theirs.config.with_box_refine:
            pairs[f"boxes of layer {layer}"] = (references[:, layer], outputs["layer_boxes"][layer])
    if theirs.config.two_stage:
        pairs["proposals' logits"] = (reference.enc_outputs_class, outputs["encoder_logits"])
        pairs["proposals' boxes"] = (reference.enc_outputs_coord_logits.sigmoid(), outputs["encoder_boxes"])
    for name, (expected, actual) in pairs.items():
        assert (actual - expected).abs().max() <= tolerance, name
    assert reference.logits.std() > 0.1  # the outputs are not constant
    assert reference.pred_boxes.std(dim=(0, 1)).max() > 0.005
