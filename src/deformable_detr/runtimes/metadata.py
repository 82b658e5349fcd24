"""Metadata of exported files, stored as JSON strings by key in every file format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config.detector import AdapterConfig, DetectorConfig
from ..config.image_size import FitInside, ResizeRule, ShortestEdge
from ..config.schema import ModelConfig
from ..utils.errors import UserError

FORMAT, VERSION = "deformable-detr", 1
NAMESPACE = "deformable_detr"  # prefix of the keys in .pt2 files and in OpenVINO's rt_info
REQUIRED_KEYS = ("format", "version", "model", "image_size", "precision", "sampling", "post_processing")


def output_names(config: DetectorConfig, post_processing: bool) -> tuple[str, ...]:
    """Return the names of a file's outputs in order: those of the model, then those of the post-processing."""
    own = ("pred_masks",) if isinstance(config, AdapterConfig) else ("mask_embeddings", "mask_features")
    names = ("pred_logits", "pred_boxes", *(own if config.masks else ()))
    return (*names, "boxes", "scores", "labels", *(("masks",) if config.masks else ())) if post_processing else names


@dataclass(frozen=True)
class ExportMetadata:
    """The model's config, including its normalization, and the options of its export (see `export.ExportOptions`)."""

    config: DetectorConfig
    image_size: tuple[int, int] | None
    precision: str
    sampling: str
    post_processing: bool

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the file's outputs in order; see `output_names`."""
        return output_names(self.config, self.post_processing)

    @property
    def resize_rule(self) -> ResizeRule:
        """The size that an image is resized to before it is padded to `image_size`."""
        rule = self.config.resize_rule
        if self.image_size and isinstance(rule, ShortestEdge):
            return FitInside(*self.image_size, rule.antialias)
        return rule

    def to_strings(self) -> dict[str, str]:
        """Return JSON strings by key; `model` is the whole config, other keys repeat what other programs need."""
        config = self.config
        values: dict[str, Any] = {"format": FORMAT, "version": VERSION, "model": config.model_dump(mode="json")}
        repeated = (
            "class_names", "category_ids", "pixel_mean", "pixel_std", "resize", "antialias", "long_side",
            "size_divisor", "nms_iou",
        )  # fmt: skip
        values |= {"short_side": config.resize_rule.short} | {key: getattr(config, key) for key in repeated}
        options = ("image_size", "precision", "sampling", "post_processing")
        values |= {key: getattr(self, key) for key in options}
        return {key: json.dumps(value) for key, value in values.items()}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str], path: str) -> ExportMetadata:
        """Parse the strings of the file `path`. Raises UserError if they are damaged or not from this package."""
        try:
            values = {key: json.loads(strings[key]) for key in REQUIRED_KEYS if key in strings}
            if (values.get("format"), values.get("version")) != (FORMAT, VERSION):
                raise UserError(f"{path} was not written by `deformable-detr export` of this release: export it again")
            size, model = values["image_size"], values["model"]
            return cls(
                config=(AdapterConfig if "family" in model else ModelConfig).from_dict(model, path),
                image_size=None if size is None else (int(size[0]), int(size[1])),
                precision=values["precision"],
                sampling=values["sampling"],
                post_processing=values["post_processing"],
            )
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise UserError(f"{path}: its metadata is damaged ({error}); export the model again") from None
