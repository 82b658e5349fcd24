"""The presets: each is a small function that states how it differs from its base."""

from collections.abc import Callable
from typing import Any

from ..utils.errors import UserError
from .schema import Config, ModelConfig, TrainConfig


def multi_scale(**changes: Any) -> ModelConfig:
    """The paper's base model: four levels, strides 8 to 64 (table 1, "Deformable DETR")."""
    return ModelConfig.from_dict(changes)


def single_scale(**changes: Any) -> ModelConfig:
    """One level: the last feature map of the backbone, stride 32 (table 1, "single scale")."""
    return multi_scale(**{"num_feature_levels": 1, **changes})


def single_scale_dc5(**changes: Any) -> ModelConfig:
    """One level at stride 16: the last stage is dilated (table 1, "single scale, DC5")."""
    return single_scale(**{"dilation": True, **changes})


def refine(**changes: Any) -> ModelConfig:
    """Multi-scale with iterative bounding box refinement (section 4.2, appendix A.4)."""
    return multi_scale(**{"refine": True, **changes})


def two_stage(**changes: Any) -> ModelConfig:
    """Refinement with queries initialized from encoder proposals (section 4.2, appendix A.4)."""
    return refine(**{"two_stage": True, **changes})


def dino(**changes: Any) -> ModelConfig:
    """DINO with four scales (Zhang et al. 2022, arXiv 2203.03605): learned queries at the boxes of proposals."""
    base: dict[str, Any] = {"num_queries": 900, "ffn_dim": 2048, "dropout": 0.0, "position_encoding": "dino"}
    base |= {"class_aware_proposals": True, "query_init": "learned", "iterative_query_pos": "dino"}
    base |= {"decoder_norm": True, "look_forward_twice": True, "box_eps": (1e-3, 1e-3)}
    return two_stage(**{**base, **changes})


def dino_5scale(**changes: Any) -> ModelConfig:
    """DINO with five scales, from stride 4."""
    return dino(**{"num_feature_levels": 5, "finest_stride": 4, **changes})


def dino_swin_l(**changes: Any) -> ModelConfig:
    """DINO with four scales of Swin-L."""
    return dino(**{"backbone": "swin_large_patch4_window12_384", "frozen_stages": 0, **changes})


def small(**changes: Any) -> ModelConfig:
    """For CPUs and small datasets: a light backbone, half the width, fewer layers, faster convergence.

    Two-stage with class-aware proposals and queries initialized from the encoder's tokens (DINO, RT-DETR), positions
    that follow the boxes (DAB-DETR) and look forward twice (DINO). An RoI head refines the last layer's predictions.
    """
    base = {"backbone": "tf_efficientnet_lite0", "image_size": 480, "num_queries": 100, "dropout": 0.0}
    base["size_divisor"] = 32  # feature maps that overhang a small image shift its boxes
    base |= {"hidden_dim": 128, "num_heads": 4, "encoder_layers": 2, "decoder_layers": 3, "ffn_dim": 512}
    base |= {"class_aware_proposals": True, "query_init": "encoder", "iterative_query_pos": True}
    base |= {"look_forward_twice": True, "roi_grid": 5, "nms_iou": 0.6, "frozen_stages": 0}
    return two_stage(**{**base, **changes})


def small_masks(**changes: Any) -> ModelConfig:
    """`small` that also predicts masks."""
    return small(**{"masks": True, **changes})


def small_portable(**changes: Any) -> ModelConfig:
    """`small` limited to what transformers supports: the paper's proposals, queries and query positions."""
    base = {"class_aware_proposals": False, "query_init": "box", "iterative_query_pos": False}
    base |= {"roi_grid": 0, "nms_iou": None}
    return small(**{**base, **changes})


PRESETS: dict[str, Callable[..., ModelConfig]] = {
    "single-scale": single_scale,
    "single-scale-dc5": single_scale_dc5,
    "multi-scale": multi_scale,
    "refine": refine,
    "two-stage": two_stage,
    "dino": dino,
    "dino-5scale": dino_5scale,
    "dino-swin-l": dino_swin_l,
    "small": small,
    "small-masks": small_masks,
    "small-portable": small_portable,
}


def config(name: str) -> Config:
    """Return a preset's model with its training recipe. Raises UserError if there is no such preset."""
    if name not in PRESETS:
        raise UserError(f"unknown preset '{name}'; choose from {', '.join(PRESETS)}")
    model = PRESETS[name]()
    if name.startswith("dino"):
        return Config(preset=name, model=model, train=_dino_recipe(batch_size=1 if name == "dino-5scale" else 2))
    if name not in ("small", "small-masks", "small-portable"):
        return Config(preset=name, model=model)
    train = TrainConfig(
        epochs="auto",
        eval_every="auto",
        lr=1e-3,
        backbone_lr_mult=0.5,
        lr_schedule="cosine",
        warmup_steps=100,
        sampling_lr_mult=1.0,
        clip_max_norm=1.0,
        class_loss="mal",
        num_denoising=100,
        ema_decay=0.9998,
    )
    return Config(preset=name, model=model, train=train)


def _dino_recipe(batch_size: int) -> TrainConfig:
    """DINO's (appendix D, published configurations): 12 epochs, 16 images per step, 100 pairs of denoising queries."""
    return TrainConfig(
        epochs=12,
        batch_size=batch_size,
        total_batch_size=16,
        base_batch_size=16,
        lr=1e-4,
        sampling_lr_mult=1.0,
        lr_drop=11 / 12,
        class_weight=1.0,
        num_denoising=200,
    )
