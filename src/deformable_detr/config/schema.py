"""Every setting of the product, validated in one place.

A `Config` holds three frozen parts: the model, the data and the training. An unknown key or a bad value is a
`UserError` of one line that names it. `presets.py` states how the variants differ from the defaults here.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from ..utils.errors import UserError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Triple = tuple[float, float, float]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str = "the config") -> Self:
        """The validated section; every problem is one `UserError` that names the key, the value and `where`."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(_explain(cls, error, where)) from None

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return type(self).read({**self.model_dump(), **changes})


class ResNetShape(_Section):
    """A residual network of any size, for weights from elsewhere; timm has names for the usual ones."""

    block: Literal["basic", "bottleneck"] = "bottleneck"
    depths: tuple[Positive, ...] = Field(default=(3, 4, 6, 3), min_length=1, description="blocks of each stage")
    widths: tuple[Positive, ...] = Field(default=(256, 512, 1024, 2048), description="channels that each stage gives")
    stem: Positive = Field(default=64, description="channels of the first convolution")
    activation: Literal["relu", "gelu", "silu"] = Field(
        default="relu", description="of the stem and at the end of each block; inside the blocks it is always ReLU"
    )
    stride_first: bool = Field(default=False, description="bottleneck: the first 1×1 convolution strides, not the 3×3")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.depths) != len(self.widths):
            raise ValueError(f"depths has {len(self.depths)} stages and widths {len(self.widths)}")
        return self


class ModelConfig(_Section):
    """The network. Defaults are the paper's multi-scale model (section 4 and appendix A.4)."""

    class_names: tuple[str, ...] = Field(default=(), description="names of the classes, in label order")
    category_ids: tuple[int, ...] = Field(default=(), description="the data set's own id of each label")
    num_classes: Positive = Field(default=91, description="class logits a query")

    backbone: str = Field(default="resnet50", description="any timm model that gives feature maps")
    backbone_shape: ResNetShape | None = Field(
        default=None, description="a ResNet of this size instead of a timm model; without weights of its own"
    )
    backbone_weights: str = Field(default="hub", description="'hub', 'none' or the path of a safetensors file")
    backbone_norm: Literal["auto", "frozen", "train"] = Field(
        default="auto", description="batch norms of the backbone; auto: frozen where it starts from weights"
    )
    frozen_stages: NonNegative | None = Field(
        default=None,
        description="leading backbone stages kept fixed; none given: 2 where it starts from weights, else 0",
    )
    dilation: bool = Field(default=False, description="DC5: the last backbone stage keeps stride 16 by dilation")
    num_feature_levels: Positive = Field(
        default=4, description="1: the last feature map; more: strides 8, 16, 32, 64, …"
    )
    image_size: Positive = Field(default=800, description="short side of the input in pixels")
    max_size: Positive | None = Field(default=None, description="long side at most; none: image_size × 1333 / 800")
    size_divisor: Positive = Field(
        default=1, description="sides of the input are rounded to multiples of so many pixels"
    )
    pixel_mean: Triple | None = Field(default=None, description="RGB mean in 0..1; none given: the backbone's own")
    pixel_std: Triple | None = Field(default=None, description="RGB deviation in 0..1; none given: the backbone's own")

    hidden_dim: Positive = 256
    num_heads: Positive = 8
    encoder_layers: NonNegative = 6
    decoder_layers: Positive = 6
    encoder_points: Positive = 4
    decoder_points: Positive = 4
    ffn_dim: Positive = 1024
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    activation: Literal["relu", "gelu", "silu"] = "relu"
    pre_norm: bool = False
    position_encoding: Literal["sine", "learned"] = "sine"
    num_queries: Positive = 300
    refine: bool = Field(default=False, description="each decoder layer refines the boxes of the one before")
    two_stage: bool = Field(default=False, description="the encoder proposes the queries' boxes; needs refine")
    class_aware_proposals: bool = Field(
        default=False, description="two-stage: proposals scored by their best class, not by 'object' (DINO)"
    )
    query_init: Literal["box", "learned", "encoder"] = Field(
        default="box",
        description="two-stage: queries start from the proposal's box (paper), from learned vectors (DINO's mixed "
        "query selection) or from the encoder's token (RT-DETR)",
    )
    iterative_query_pos: bool = Field(
        default=False, description="refine: query positions follow the refined boxes layer by layer (DAB-DETR)"
    )
    look_forward_twice: bool = Field(
        default=False, description="refine: a layer's box loss also trains the layer before (DINO)"
    )
    gradient_checkpointing: bool = Field(default=False, description="recompute layers in the backward pass, for memory")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"hidden_dim {self.hidden_dim} is no multiple of num_heads {self.num_heads}")
        if self.hidden_dim % 4:
            raise ValueError(f"hidden_dim {self.hidden_dim} is no multiple of 4, which the position encoding needs")
        if self.two_stage and not self.refine:
            raise ValueError("two_stage needs refine: true")
        if self.two_stage and not self.encoder_layers:
            raise ValueError("two_stage needs at least one encoder layer")
        if not self.two_stage and (self.class_aware_proposals or self.query_init != "box"):
            raise ValueError("class_aware_proposals and query_init are for two_stage: true")
        if self.iterative_query_pos and not self.two_stage:
            raise ValueError("iterative_query_pos needs two_stage: true, where queries have boxes from the start")
        if self.look_forward_twice and not self.refine:
            raise ValueError("look_forward_twice needs refine: true")
        if self.backbone_shape and (self.dilation or self.backbone_weights != "none"):
            raise ValueError("backbone_shape needs backbone_weights: none and has no dilation")
        if self.dilation and self.num_feature_levels != 1:
            raise ValueError("dilation (DC5) is for num_feature_levels: 1")
        for name in ("class_names", "category_ids"):
            values = getattr(self, name)
            if values and len(values) != self.num_classes:
                raise ValueError(f"{name} has {len(values)} entries for num_classes {self.num_classes}")
        if len(set(self.category_ids)) != len(self.category_ids):
            raise ValueError("category_ids has an id twice")
        if self.pixel_std and min(self.pixel_std) <= 0:
            raise ValueError("pixel_std must be above 0")
        if self.max_size is not None and self.max_size < self.image_size:
            raise ValueError(f"max_size {self.max_size} is under image_size {self.image_size}")
        return self

    @property
    def long_side(self) -> int:
        """The long side's limit in pixels."""
        return self.max_size or round(self.image_size * 1333 / 800)

    def without_download(self) -> ModelConfig:
        """The same network for when its weights come from a file: nothing to fetch, and what was frozen stays so."""
        pretrained = self.backbone_weights != "none"
        return self.replace(
            backbone_weights="none",
            backbone_norm="frozen" if self.backbone_norm == "auto" and pretrained else self.backbone_norm,
            frozen_stages=2 if self.frozen_stages is None and pretrained else self.frozen_stages,
        )


class DataConfig(_Section):
    """Where the images are and how they become batches. Defaults are the paper's."""

    train_scales: tuple[PositiveFloat, PositiveFloat] = Field(
        default=(0.6, 1.0), description="range of the short side in training, relative to image_size"
    )
    hflip_prob: Fraction = Field(default=0.5, description="chance of a horizontal flip in training")
    crop_prob: Fraction = Field(default=0.5, description="chance of a random crop before the resize in training")
    train_split: str = "train"
    val_split: str = "val"
    images: str | None = Field(default=None, description="folder of the training images, for sets in no known layout")
    annotations: str | None = Field(default=None, description="COCO JSON of the training images, likewise")
    val_images: str | None = None
    val_annotations: str | None = None
    min_visibility: Fraction = Field(
        default=0.0, description="a crop is drawn again where it would leave less than this part of an object's area"
    )
    color_jitter_prob: Fraction = Field(
        default=0.0, description="chance of another brightness, contrast and saturation in training (SSD)"
    )
    mosaic_prob: Fraction = Field(default=0.0, description="chance that three more images share the picture (YOLOv4)")
    close_mosaic: Fraction = Field(default=0.8, description="part of the training after which there is no mosaic")
    aspect_ratio_grouping: bool = Field(
        default=False, description="images of like size and shape share a batch in training: less padding"
    )
    workers: NonNegative = Field(default=2, description="processes that load images; 0: none beside the main one")
    # YAML reads off as false.
    check: Annotated[Literal["auto", "full", "off"], BeforeValidator(lambda x: "off" if x is False else x)] = Field(
        default="auto", description="look for faults in the set before training; auto: at most 40 seconds; full: all"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.train_scales[0] > self.train_scales[1]:
            raise ValueError("train_scales must be (smallest, largest)")
        return self


class TrainConfig(_Section):
    """The optimization. Defaults are the paper's (section 5 and the published configurations)."""

    weights: str | None = Field(
        default=None, description="model to start from: a folder, a hub id or an official checkpoint; none: no model"
    )
    epochs: Positive | Literal["auto"] | None = Field(
        default=50,
        description="stop after so many epochs; auto: by the number of training images; none: as minutes say",
    )
    minutes: PositiveFloat | None = Field(
        default=None, description="stop after so many minutes of training, evaluation and saving not counted"
    )
    batch_size: Positive = Field(default=4, description="images that a process has in memory at a time")
    total_batch_size: Positive | None = Field(
        default=None, description="images an optimizer step, over all processes; none: batch_size in each process"
    )
    lr: PositiveFloat = 2e-4
    base_batch_size: Positive | None = Field(
        default=None,
        description="images an optimizer step that lr is meant for; none: 4 with total_batch_size, else batch_size",
    )
    backbone_lr_mult: Weight = Field(default=0.1, description="backbone's learning rate, relative to lr")
    sampling_lr_mult: Weight = Field(
        default=0.1, description="learning rate of sampling offsets and reference points, relative to lr"
    )
    weight_decay: Weight = 1e-4
    clip_max_norm: Weight = Field(default=0.1, description="limit of the gradient's norm; 0: none")
    warmup_steps: NonNegative = 0
    lr_schedule: Literal["step", "cosine"] = "step"
    lr_drop: Fraction = Field(default=0.8, description="part of the training after which lr falls to a tenth")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = Field(default="auto", description="auto: cuda where there is one, then mps, else cpu")
    seed: NonNegative = 0
    eval_every: Positive | Literal["auto"] = Field(
        default=1, description="epochs between evaluations; auto: 1, more for small sets"
    )
    patience: Positive | None = Field(default=None, description="stop after so many evaluations without a better AP")
    log_every: Positive = Field(default=20, description="steps between lines of metrics.jsonl")

    class_cost: Weight = 2.0
    l1_cost: Weight = 5.0
    giou_cost: Weight = 2.0
    class_weight: Weight = 2.0
    l1_weight: Weight = 5.0
    giou_weight: Weight = 2.0
    focal_alpha: Fraction = 0.25
    focal_gamma: Weight = 2.0
    auxiliary_loss: bool = True

    class_loss: Literal["focal", "mal"] = Field(
        default="focal", description="focal (paper), or mal: matchability-aware loss, targets follow the IoU (DEIM)"
    )
    num_denoising: NonNegative = Field(default=0, description="extra denoising queries, about; 0: none (DINO: 100)")
    box_noise: Weight = Field(default=1.0, description="of denoising: how far sides move, relative to half a side")
    label_noise: Fraction = Field(default=0.5, description="of denoising: twice the part of labels drawn anew")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="decay a step of the averaged weights that are evaluated and kept; 0: none"
    )

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.epochs is None and self.minutes is None:
            raise ValueError("give epochs or minutes, or the training would never end")
        return self


class Config(_Section):
    """Everything that a run depends on."""

    preset: str = "multi-scale"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    def to_yaml(self) -> str:
        """The config as YAML that `read_config` takes back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def merged(self, changes: Mapping[str, Any], where: str = "the config") -> Config:
        """A validated copy with nested `changes` laid over it."""
        return Config.read(merge(self.model_dump(), changes), where)


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The nested keys of a YAML file; a missing or malformed file is a `UserError`."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"config file {path} is not valid YAML: {line}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"config file {path} must hold keys such as 'train:' and 'model:'")
    return values


def parse_overrides(settings: Sequence[str]) -> dict[str, Any]:
    """Nested keys from `section.key=value` strings, as `--set` takes them; values are read as YAML."""
    nested: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise UserError(f"--set {setting}: write KEY=VALUE, for example --set train.lr=1e-4")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--set {setting}: the value is not valid YAML") from None
        *sections, last = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(f"--set {setting}: '{section}' was given a value before")
        place[last] = value
    return nested


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested keys with `changes` laid over them: a section merges, anything else replaces."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _explain(section: type[BaseModel], error: ValidationError, where: str) -> str:
    """One line for the first problem: the key with its path, what is wrong, and what would be right."""
    problems: dict[tuple[str, ...], list[ErrorDetails]] = {}  # where a value may be of two kinds, it failed for both
    for one in error.errors(include_url=False):
        problems.setdefault(_known_path(section, one["loc"], one["type"]), []).append(one)
    path, (problem, *others) = next(iter(problems.items()))
    key = ".".join(path) or section.__name__
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = _fields_at(section, path[:-1])
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}"
        return f"{where}: unknown key '{key}'; {hint}{more}"
    message = problem["msg"].removeprefix("Value error, ")
    message += "".join(f" or {other['msg'].removeprefix('Input should be ')}" for other in others)
    value = "" if isinstance(problem["input"], dict | BaseModel) else f" (given: {problem['input']!r})"
    return f"{where}: {key}: {message[0].lower()}{message[1:]}{value}{more}"


def _known_path(section: type[BaseModel], place: Sequence[str | int], kind: str) -> tuple[str, ...]:
    """Where a problem is, without the kinds of value that pydantic puts at the end."""
    path = tuple(map(str, place))
    end = next((end for end, part in enumerate(path) if part not in _fields_at(section, path[:end])), len(path))
    return path[: end + 1] if kind == "extra_forbidden" else path[:end]


def _fields_at(section: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        field = section.model_fields.get(part)
        kind = field.annotation if field else None
        options = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        inner = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not inner:
            return []
        section = inner[0]
    return list(section.model_fields)
