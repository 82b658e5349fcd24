"""Settings that all detectors share: classes, input and queries; and the config of detectors of transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from .image_size import FixedSize, ModelResize, ShortestEdge
from .section import ConfigSection, Pixels, Size

RGB = tuple[float, float, float]


class DetectorConfig(ConfigSection):
    """Classes, input and queries of a detector."""

    class_names: tuple[str, ...] = ()
    """Class names in label order."""
    category_ids: tuple[Annotated[int, Field(ge=-(2**63), lt=2**63)], ...] = ()
    """The dataset's category id of each label."""
    num_classes: Size = 91
    """Class logits per query."""
    num_queries: Size = 300
    """Object queries per image."""

    masks: bool = False
    """Also predict a mask for each object."""
    nms_iou: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Remove detections that overlap a better one of their class by more than this IoU. If omitted: keep all. An
    RoI head learns to rely on it; see `roi_grid`."""

    resize: Literal["shortest_edge", "fixed"] = "shortest_edge"
    """shortest_edge: keep the aspect ratio; fixed: stretch images to image_size × image_width."""
    image_size: Pixels = 800
    """Short side of the input in pixels; with resize fixed, its height."""
    image_width: Pixels | None = None
    """Resize fixed: width of the input in pixels. If omitted: image_size."""
    max_size: Pixels | None = None
    """Maximum long side of the input in pixels. If omitted: image_size × 1333 / 800."""
    size_divisor: Pixels = 1
    """Round input sides to multiples of this many pixels."""
    antialias: bool = True
    """Smooth images that are shrunk."""
    pixel_mean: RGB | None = None
    """RGB mean in 0..1. If omitted: the backbone's."""
    pixel_std: RGB | None = None
    """RGB standard deviation in 0..1. If omitted: the backbone's."""

    @model_validator(mode="after")
    def _check_classes_and_input(self) -> Self:
        for name in ("class_names", "category_ids"):
            if (count := len(getattr(self, name))) not in (0, self.num_classes):
                raise ValueError(f"{name} has {count} entries, but num_classes is {self.num_classes}")
        fixed, divisor = self.resize == "fixed", self.size_divisor
        multiple = self.image_size % divisor == 0 and (self.image_width or divisor) % divisor == 0
        violations = (
            (len(set(self.category_ids)) != len(self.category_ids), "category_ids has duplicates"),
            (self.pixel_std and min(self.pixel_std) <= 0, "pixel_std must be greater than 0"),
            (fixed and self.max_size, "resize: fixed has no max_size; set image_width"),
            (not fixed and self.image_width, "image_width requires resize: fixed"),
            (fixed and not multiple, f"with resize: fixed, image_size and image_width must be multiples of {divisor}"),
            (self.long_side < self.image_size, f"max_size {self.max_size} is less than image_size {self.image_size}"),
        )
        for violated, message in violations:
            if violated:
                raise ValueError(message)
        return self

    @property
    def long_side(self) -> int:
        """Maximum long side of the input in pixels."""
        if self.resize == "fixed":
            return max(self.image_size, self.image_width or self.image_size)
        return self.max_size or round(self.image_size * 1333 / 800)

    @property
    def resize_rule(self) -> ModelResize:
        """Size of the input for the size of an image."""
        if self.resize == "fixed":
            return FixedSize(self.image_size, self.image_width or self.image_size, self.antialias)
        return ShortestEdge(self.image_size, self.long_side, self.size_divisor, antialias=self.antialias)

    @property
    def summary(self) -> str:
        """One line about the network, for people."""
        return f"Queries: {self.num_queries}."

    def without_pretrained_backbone(self) -> Self:
        """Return a config that downloads no backbone weights."""
        return self


class AdapterConfig(DetectorConfig):
    """A detector of transformers with multi-scale deformable attention."""

    family: str
    """transformers' model type, such as d_fine."""
    network: Annotated[dict[str, Any], Field(repr=False)]
    """transformers' config of the network, without its classes."""
    processor: dict[str, Any] = Field(default_factory=dict, repr=False)
    """The source's settings of transformers' image processor, which are saved with the model."""
    pixel_mean: RGB = (0.0, 0.0, 0.0)
    """RGB mean in 0..1."""
    pixel_std: RGB = (1.0, 1.0, 1.0)
    """RGB standard deviation in 0..1."""

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        same = {"num_queries": "num_queries", "two_stage_num_proposals": "num_queries", "num_labels": "num_classes"}
        for name, field in same.items():
            if name in self.network:
                raise ValueError(f"network.{name} is not used; set {field} instead")
        return self

    @property
    def resize_rule(self) -> ModelResize:
        """Size of the input for the size of an image, as transformers' image processors compute it."""
        rule = super().resize_rule
        return replace(rule, exact_ratio=True) if isinstance(rule, ShortestEdge) else rule
