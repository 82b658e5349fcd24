"""What a file says of its model: as JSON strings by key, which every format can carry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..config.schema import ModelConfig
from ..utils.errors import UserError

FORMAT, VERSION = "deformable-detr", 1


class Described(NamedTuple):
    """The model's config with its normalization in it, and how it was exported.

    image_size: (height, width) of the input, none: any. precision: fp32, fp16 or int8.
    """

    config: ModelConfig
    image_size: tuple[int, int] | None
    precision: str
    sampling: str
    post_processing: bool

    def to_strings(self) -> dict[str, str]:
        """JSON by key. `model` is all of the config; what other programs need stands by itself."""
        config = self.config
        values: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "model": config.model_dump(mode="json"),
            "class_names": config.class_names,
            "category_ids": config.category_ids,
            "pixel_mean": config.pixel_mean,
            "pixel_std": config.pixel_std,
            "image_size": self.image_size,
            "short_side": config.image_size,
            "long_side": config.long_side,
            "size_divisor": config.size_divisor,
            "precision": self.precision,
            "sampling": self.sampling,
            "post_processing": self.post_processing,
        }
        return {key: json.dumps(value, ensure_ascii=True) for key, value in values.items()}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str], where: str) -> Described:
        """Raises UserError for a file that this package did not write."""
        try:
            values = {key: json.loads(text) for key, text in strings.items() if key in _KEYS}
            if values.get("format") != FORMAT:
                raise UserError(f"{where} was not written by `deformable-detr export`: it says nothing of its classes")
            if values["version"] != VERSION:
                raise UserError(f"{where} has version {values['version']!r}; this release reads {VERSION}")
            size = values["image_size"]
            return cls(
                ModelConfig.from_dict(values["model"], where),
                None if size is None else (int(size[0]), int(size[1])),
                values["precision"], values["sampling"], values["post_processing"],
            )  # fmt: skip
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise UserError(f"{where}: its description of the model is broken: {error}") from None


_KEYS = frozenset({"format", "version", "model", "image_size", "precision", "sampling", "post_processing"})


_DESCRIPTION = "deformable_detr"  # where OpenVINO's IR and .pt2 keep the metadata


METADATA_KEYS = (
    "format", "version", "model", "class_names", "category_ids", "pixel_mean", "pixel_std", "image_size", "short_side",
    "long_side", "size_divisor", "precision", "sampling", "post_processing",
)  # fmt: skip
