"""The variants: each a small function that says how it differs from the base.

The functions return a `ModelConfig`; `config(name)` returns the whole `Config` that goes with a preset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..utils.errors import UserError
from .schema import Config, ModelConfig, TrainConfig


def multi_scale(**changes: Any) -> ModelConfig:
    """The paper's base model: four levels at strides 8 to 64 (table 1, "Deformable DETR")."""
    return ModelConfig.read(changes)


def single_scale(**changes: Any) -> ModelConfig:
    """One level, the backbone's last map at stride 32 (table 1, "single scale")."""
    return multi_scale(**{"num_feature_levels": 1, **changes})


def single_scale_dc5(**changes: Any) -> ModelConfig:
    """One level at stride 16: the last stage is dilated instead of strided (table 1, "single scale, DC5")."""
    return single_scale(**{"dilation": True, **changes})


def refine(**changes: Any) -> ModelConfig:
    """Multi-scale with iterative bounding box refinement (section 4.2, appendix A.4)."""
    return multi_scale(**{"refine": True, **changes})


def two_stage(**changes: Any) -> ModelConfig:
    """Refinement, and queries that start from the encoder's own proposals (section 4.2, appendix A.4)."""
    return refine(**{"two_stage": True, **changes})


def small(**changes: Any) -> ModelConfig:
    """For CPUs and small sets: a light backbone, half the width, fewer layers, and queries that learn faster.

    Two-stage with class-aware proposals whose tokens become the queries (DINO, RT-DETR), positions that follow the
    boxes (DAB-DETR) and a look forward twice (DINO).
    """
    # On small images a stride that does not divide the side matters: maps then end beyond the image, each by another
    # part of it, and some backbones shift them by whole pixels, so that boxes come out beside their objects.
    base = {"backbone": "tf_efficientnet_lite0", "image_size": 480, "size_divisor": 32}
    base |= {"num_queries": 100, "dropout": 0.0}
    base |= {"hidden_dim": 128, "num_heads": 4, "encoder_layers": 2, "decoder_layers": 3, "ffn_dim": 512}
    base |= {
        "class_aware_proposals": True,
        "query_init": "encoder",
        "iterative_query_pos": True,
        "look_forward_twice": True,
    }
    return two_stage(**{**base, **changes})


def small_portable(**changes: Any) -> ModelConfig:
    """`small` as transformers can run it: proposals and queries as in the paper, and positions that stay.

    The look forward twice concerns training only, so it may stay.
    """
    base = {"class_aware_proposals": False, "query_init": "box", "iterative_query_pos": False}
    return small(**{**base, **changes})


MODELS: dict[str, Callable[..., ModelConfig]] = {
    "single-scale": single_scale,
    "single-scale-dc5": single_scale_dc5,
    "multi-scale": multi_scale,
    "refine": refine,
    "two-stage": two_stage,
    "small": small,
    "small-portable": small_portable,
}


def config(name: str) -> Config:
    """The whole config of a preset: its model with the image size and training that go with it."""
    if name not in MODELS:
        raise UserError(f"unknown preset '{name}'; choose from {', '.join(MODELS)}")
    model = MODELS[name]()
    if name in ("small", "small-portable"):
        train = TrainConfig(
            epochs="auto",
            eval_every="auto",
            lr=1e-3,
            backbone_lr_mult=0.2,
            lr_schedule="cosine",
            warmup_steps=100,
            sampling_lr_mult=1.0,
            clip_max_norm=1.0,
            class_loss="mal",
            num_denoising=100,
            ema_decay=0.9998,
        )
        return Config(preset=name, model=model, train=train)
    return Config(preset=name, model=model)
