"""Types of the keyword options of `train()`, for editors and type checkers."""

from __future__ import annotations

from typing import Literal, TypedDict

from ..config.schema import ResNetShape


class TrainOptions(TypedDict, total=False):
    """Every setting of the config by its own name; `config/schema.py` describes them.

    The classes are missing: they come from the dataset.
    """

    weights: str | None
    epochs: int | Literal["auto"] | None
    minutes: float | None
    batch_size: int
    total_batch_size: int | None
    lr: float
    base_batch_size: int | None
    backbone_lr_mult: float
    sampling_lr_mult: float
    weight_decay: float
    clip_max_norm: float
    warmup_steps: int
    lr_schedule: Literal["step", "cosine"]
    lr_drop: float
    precision: Literal["fp32", "bf16", "fp16"]
    device: str
    seed: int
    eval_every: int | Literal["auto"]
    patience: int | None
    log_every: int
    tensorboard: bool
    class_cost: float
    l1_cost: float
    giou_cost: float
    class_weight: float
    l1_weight: float
    giou_weight: float
    focal_alpha: float
    focal_gamma: float
    auxiliary_loss: bool
    class_loss: Literal["focal", "mal"]
    num_denoising: int
    box_noise: float
    label_noise: float
    ema_decay: float

    train_scales: tuple[float, float]
    hflip_prob: float
    crop_prob: float
    train_split: str
    val_split: str
    images: str | None
    annotations: str | None
    val_images: str | None
    val_annotations: str | None
    min_visibility: float
    color_jitter_prob: float
    mosaic_prob: float
    close_mosaic: float
    aspect_ratio_grouping: bool
    workers: int
    check: Literal["auto", "full", "off"]

    backbone: str
    backbone_shape: ResNetShape | None
    backbone_weights: str
    backbone_norm: Literal["auto", "frozen", "train"]
    frozen_stages: int | None
    dilation: bool
    num_feature_levels: int
    image_size: int
    max_size: int | None
    size_divisor: int
    pixel_mean: tuple[float, float, float] | None
    pixel_std: tuple[float, float, float] | None
    hidden_dim: int
    num_heads: int
    encoder_layers: int
    decoder_layers: int
    encoder_points: int
    decoder_points: int
    ffn_dim: int
    dropout: float
    activation: Literal["relu", "gelu", "silu"]
    pre_norm: bool
    position_encoding: Literal["sine", "learned"]
    num_queries: int
    refine: bool
    two_stage: bool
    class_aware_proposals: bool
    query_init: Literal["box", "learned", "encoder"]
    iterative_query_pos: bool
    look_forward_twice: bool
    gradient_checkpointing: bool
