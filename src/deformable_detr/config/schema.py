"""All settings: model, data and training. `presets.py` defines how the variants differ from these defaults.

The string below each field is its description: the help of command-line options and the configuration reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from ..utils.tiles import MIN_TILE
from .detector import AdapterConfig, DetectorConfig
from .section import ConfigSection, Layers, Size, merge

Fraction = Annotated[float, Field(ge=0, le=1)]


class ResNetShape(ConfigSection):
    """A ResNet of any size, for weights that do not come from timm."""

    block: Literal["basic", "bottleneck"] = "bottleneck"
    """Kind of residual block."""
    depths: tuple[Layers, ...] = Field(default=(3, 4, 6, 3), min_length=1)
    """Blocks per stage."""
    widths: tuple[Size, ...] = (256, 512, 1024, 2048)
    """Output channels of each stage."""
    stem: Size = 64
    """Channels of the first convolution."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Activation of the stem and at the end of each block; inside blocks it is ReLU."""
    stride_first: bool = False
    """Bottleneck: stride in the first 1×1 convolution instead of the 3×3."""

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if len(self.depths) != len(self.widths):
            raise ValueError(f"depths has {len(self.depths)} stages, but widths has {len(self.widths)}")
        return self


class ModelConfig(DetectorConfig):
    """The network. Defaults: the paper's multi-scale model (section 4, appendix A.4)."""

    backbone: str = "resnet50"
    """Name of a timm model that returns feature maps."""
    backbone_shape: ResNetShape | None = None
    """Use a ResNet of this shape instead of a timm model, without pretrained weights."""
    backbone_weights: str = "hub"
    """hub (download), none (random) or the path of a safetensors file."""
    backbone_norm: Literal["auto", "frozen", "train"] = "auto"
    """Batch norms of the backbone; auto: frozen if its weights are pretrained."""
    frozen_stages: NonNegativeInt | None = None
    """Number of frozen leading backbone stages. If omitted: 2 if pretrained, else 0."""
    dilation: bool = False
    """DC5: dilate the last backbone stage, which keeps stride 16."""
    num_feature_levels: Layers = 4
    """1: only the last feature map; more: strides 8, 16, 32, 64, …"""
    finest_stride: Literal[8, 4] = 8
    """Stride of the first level if there are more than 3; 4: strides 4, 8, 16, 32, … (DINO with 5 scales)."""

    hidden_dim: Size = 256
    """Embedding dimension of the transformer."""
    num_heads: Size = 8
    """Attention heads."""
    encoder_layers: Annotated[int, Field(ge=0, le=1000)] = 6
    """Encoder layers."""
    decoder_layers: Layers = 6
    """Decoder layers."""
    encoder_points: Size = 4
    """Sampling points per head and level in the encoder."""
    decoder_points: Size = 4
    """Sampling points per head and level in the decoder."""
    ffn_dim: Size = 1024
    """Hidden dimension of the feed-forward networks."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout probability."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Activation of the feed-forward networks."""
    pre_norm: bool = False
    """Normalize before each sublayer instead of after it."""
    position_encoding: Literal["sine", "dino", "learned"] = "sine"
    """Kind of position encoding; dino: sines with temperature 20 that count whole pixels."""
    refine: bool = False
    """Each decoder layer refines the boxes of the previous layer."""
    two_stage: bool = False
    """Initialize the queries from encoder proposals; requires refine."""
    class_aware_proposals: bool = False
    """Two-stage: score proposals by their best class instead of objectness (DINO)."""
    query_init: Literal["box", "learned", "encoder"] = "box"
    """Two-stage: initialize queries from proposal boxes (paper), learned vectors (DINO) or encoder tokens (RT-DETR)."""
    iterative_query_pos: bool | Literal["dino", "dab"] = False
    """Refine: compute query positions from the refined boxes in each layer (DAB-DETR). dino: from the boxes relative to
    the padded image; dab: also scaled by the query's content. Without two_stage, the first boxes are learned."""
    decoder_norm: bool = False
    """Normalize each decoder layer's output for the heads, but not to refine the next layer's boxes (DINO)."""
    box_eps: tuple[PositiveFloat, PositiveFloat] = (1e-5, 1e-5)
    """Distance from 0 and 1 that boxes keep when deltas are added to them: for the predicted boxes, and for the next
    layer's reference boxes (DINO: 1e-3)."""
    roi_grid: Annotated[int, Field(ge=0, le=32)] = 0
    """Refine: after the decoder, refine classes and boxes from this many × this many points of the backbone's stride-4
    map in each box (RoIAlign). With nms_iou, it learns from every query that overlaps an object, otherwise only from
    matched ones. 0: no such stage."""
    look_forward_twice: bool = False
    """Refine: the box loss of a layer also trains the previous layer (DINO)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        dim, heads, two_stage, refine = self.hidden_dim, self.num_heads, self.two_stage, self.refine
        proposal_options = self.class_aware_proposals or self.query_init != "box"
        timm_only = self.dilation or self.backbone_weights != "none"
        violations = (
            (dim % heads, f"hidden_dim {dim} is not divisible by num_heads {heads}"),
            (dim % 4, f"hidden_dim {dim} is not divisible by 4 (required by the position encoding)"),
            (two_stage and not refine, "two_stage requires refine: true"),
            (two_stage and not self.encoder_layers, "two_stage requires at least one encoder layer"),
            (proposal_options and not two_stage, "class_aware_proposals and query_init require two_stage: true"),
            (self.iterative_query_pos and not refine, "iterative_query_pos requires refine: true"),
            (max(self.box_eps) >= 0.5, "box_eps must be less than 0.5"),
            (self.finest_stride == 4 and self.num_feature_levels < 4, "finest_stride 4 needs num_feature_levels: 4"),
            (self.look_forward_twice and not refine, "look_forward_twice requires refine: true"),
            (self.roi_grid and not refine, "roi_grid requires refine: true"),
            (self.backbone_shape and timm_only, "backbone_shape requires backbone_weights: none and dilation: false"),
            (self.dilation and self.num_feature_levels != 1, "dilation (DC5) requires num_feature_levels: 1"),
        )
        for violated, message in violations:
            if violated:
                raise ValueError(message)
        return self

    @property
    def reads_stride4(self) -> bool:
        """Whether a head reads the backbone's stride-4 map, which need not be a feature level."""
        return self.masks or bool(self.roi_grid)

    @property
    def summary(self) -> str:
        """One line about the network, for people."""
        variant = ", two-stage" if self.two_stage else ", iterative box refinement" if self.refine else ""
        levels, queries = self.num_feature_levels, self.num_queries
        return f"Backbone {self.backbone}, feature levels: {levels}, queries: {queries}{variant}."

    def without_pretrained_backbone(self) -> Self:
        """Return a config that downloads no backbone weights; what they froze stays frozen."""
        pretrained = self.backbone_weights != "none"
        return self.replace(
            backbone_weights="none",
            backbone_norm="frozen" if self.backbone_norm == "auto" and pretrained else self.backbone_norm,
            frozen_stages=2 if self.frozen_stages is None and pretrained else self.frozen_stages,
        )


class DataConfig(ConfigSection):
    """Where the images are, how they are augmented and batched. Defaults: the paper's augmentation."""

    train_scales: tuple[PositiveFloat, PositiveFloat] = (0.6, 1.0)
    """Training: range of the short side, relative to image_size; with resize fixed, of the size of each batch."""
    hflip_prob: Fraction = 0.5
    """Training: probability of a horizontal flip."""
    crop_prob: Fraction = 0.5
    """Training: probability of a random crop before the resize; with resize fixed, a crop with a minimum IoU."""
    zoom_out_prob: Fraction = 0.0
    """Resize fixed, training: probability of shrinking the image on a larger black canvas (SSD)."""
    train_split: str = "train"
    """Name of the training split."""
    val_split: str = "val"
    """Name of the validation split."""
    images: str | None = None
    """Folder of the training images, if the dataset has no standard layout."""
    annotations: str | None = None
    """COCO JSON of the training images, if the dataset has no standard layout."""
    val_images: str | None = None
    """Folder of the validation images, as for images."""
    val_annotations: str | None = None
    """COCO JSON of the validation images, as for annotations."""
    voc_origin: Literal[0, 1] | None = None
    """Pascal VOC: number of the first pixel. If omitted, the files decide."""
    min_visibility: Fraction = 0.0
    """Redraw a crop that leaves less than this fraction of any object's area."""
    color_jitter_prob: Fraction = 0.0
    """Training: probability of jittering brightness, contrast and saturation (SSD)."""
    mosaic_prob: Fraction = 0.0
    """Training: probability of combining four images into one (YOLOv4)."""
    close_mosaic: Fraction = 0.8
    """Disable mosaic after this fraction of the training."""
    aspect_ratio_grouping: bool = False
    """Training: batch images of similar size and shape, which reduces padding."""
    tile: Annotated[int, Field(ge=MIN_TILE)] | None = None
    """Train on tiles of this side in pixels, cut from larger images; evaluations during training also use tiles."""
    empty_tile_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Tiles: share of the samples that are tiles without objects."""
    repeat_threshold: Fraction = 0.0
    """Training: show images of classes that are in a smaller share of the images more often (LVIS); 0: off."""
    workers: NonNegativeInt = 2
    """Processes that load images; 0: load in the main process."""
    check: Annotated[
        Literal["auto", "full", "off"],
        BeforeValidator(lambda value: "off" if value is False else value),  # YAML reads off as false
    ] = "auto"
    """Validate the dataset before training; auto: at most 40 seconds; full: all images."""

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.train_scales[0] > self.train_scales[1]:
            raise ValueError("train_scales must be (smallest, largest)")
        return self


class TrainConfig(ConfigSection):
    """The optimization. Defaults: the paper's (section 5, published configurations), except for the batch size.

    The recipe of the small presets is in `presets.config`.
    """

    weights: str | None = None
    """Model to fine-tune: a run or model folder, a name (see models), a transformers folder or hub id, a .pth."""
    epochs: PositiveInt | Literal["auto"] | None = 50
    """Maximum number of epochs; auto: chosen from the number of training images; none: use minutes."""
    minutes: PositiveFloat | None = None
    """Maximum minutes of training; evaluation and saving do not count."""
    batch_size: PositiveInt = 4
    """Images per process in each forward pass."""
    total_batch_size: PositiveInt | None = None
    """Images per optimizer step over all processes. If omitted: batch_size per process."""
    lr: PositiveFloat = 2e-4
    """Learning rate at base_batch_size; scaled by the square root of the batch size ratio."""
    base_batch_size: PositiveInt | None = None
    """Images per optimizer step that lr is tuned for. If omitted: 4 if total_batch_size is set, else batch_size."""
    backbone_lr_mult: NonNegativeFloat = 0.1
    """Learning rate of the backbone, relative to lr."""
    sampling_lr_mult: NonNegativeFloat = 0.1
    """Learning rate of sampling offsets and reference points, relative to lr."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay of AdamW."""
    clip_max_norm: NonNegativeFloat = 0.1
    """Maximum gradient norm; 0: no clipping."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear learning-rate warmup."""
    lr_schedule: Literal["step", "cosine"] = "step"
    """Learning-rate schedule."""
    lr_drop: Fraction = 0.8
    """Step schedule: divide lr by 10 after this fraction of the training."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of autocast."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or mps; auto: cuda, else mps, else cpu."""
    seed: NonNegativeInt = 0
    """Random seed."""
    eval_every: PositiveInt | Literal["auto"] = 1
    """Epochs between evaluations; auto: 1, or more for very small datasets or many epochs."""
    patience: PositiveInt | None = None
    """Stop after this many evaluations without an improvement of AP."""
    log_every: PositiveInt = 20
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Also write TensorBoard event files; needs pip install 'deformable-detr[tensorboard]'."""

    class_cost: NonNegativeFloat = 2.0
    """Weight of the class cost in the matcher."""
    l1_cost: NonNegativeFloat = 5.0
    """Weight of the L1 box cost in the matcher."""
    giou_cost: NonNegativeFloat = 2.0
    """Weight of the GIoU cost in the matcher."""
    mask_cost: NonNegativeFloat = 2.5
    """Weight of the mask cross-entropy cost in the matcher."""
    dice_cost: NonNegativeFloat = 2.5
    """Weight of the mask dice cost in the matcher."""
    class_weight: NonNegativeFloat = 2.0
    """Weight of the classification loss."""
    l1_weight: NonNegativeFloat = 5.0
    """Weight of the L1 box loss."""
    giou_weight: NonNegativeFloat = 2.0
    """Weight of the GIoU loss."""
    mask_weight: NonNegativeFloat = 2.5
    """Weight of the mask cross-entropy loss."""
    dice_weight: NonNegativeFloat = 2.5
    """Weight of the mask dice loss."""
    mask_points: Annotated[int, Field(ge=8)] = 512
    """Points per object where the mask losses and costs are computed."""
    focal_alpha: Fraction = 0.25
    """Alpha of the focal loss."""
    focal_gamma: NonNegativeFloat = 2.0
    """Gamma of the focal loss."""
    auxiliary_loss: bool = True
    """Also apply the losses to each intermediate decoder layer. The denoising loss always applies to all layers."""

    class_loss: Literal["focal", "mal"] = "focal"
    """Classification loss: focal (paper), or mal with IoU-aware targets (DEIM)."""
    num_denoising: NonNegativeInt = 0
    """Two-stage: approximate number of denoising queries, half of them negative; 0: none (DINO: 200)."""
    box_noise: NonNegativeFloat = 1.0
    """Denoising: maximum shift of box sides, relative to half the box size."""
    label_noise: Fraction = 0.5
    """Denoising: half this fraction of the labels is redrawn."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of the weight average that is evaluated and saved; 0: no average."""

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.epochs is None and self.minutes is None:
            raise ValueError("set epochs or minutes; otherwise training never ends")
        return self


def _kind(model: Any) -> str:
    family = model.get("family") if isinstance(model, Mapping) else getattr(model, "family", None)
    return "native" if family is None else "adapter"


AnyModel = Annotated[
    Annotated[ModelConfig, Tag("native")] | Annotated[AdapterConfig, Tag("adapter")], Discriminator(_kind)
]


class Config(ConfigSection):
    """All settings of a run."""

    preset: str = "multi-scale"
    """Name of the preset that the config started from."""
    model: AnyModel = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        names = list(TrainConfig.model_fields)
        criterion = names[names.index("class_cost") : names.index("label_noise") + 1]
        changed = [name for name in criterion if getattr(self.train, name) != TrainConfig.model_fields[name].default]
        if changed and isinstance(self.model, AdapterConfig):
            raise ValueError(f"train.{changed[0]} is not used: transformers' networks have their own loss")
        of_masks = [name for name in changed if name.startswith(("mask_", "dice_"))]
        if of_masks and not self.model.masks:
            raise ValueError(f"train.{of_masks[0]} is not used without model.masks: true")
        return self

    def to_yaml(self) -> str:
        """Return the config as YAML, for `--config` and `resolve.read_config_file`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def updated(self, changes: Mapping[str, Any], source: str = "config") -> Config:
        """Return a validated copy with nested changes merged in; see `from_dict`."""
        own = self.model_dump()
        if _kind(changes.get("model")) == "adapter" != _kind(self.model):
            del own["model"]  # another kind of network shares no default
        return Config.from_dict(merge(own, changes), source)
