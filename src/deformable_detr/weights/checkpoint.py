"""Weights as read from a file in any format, and the network that they fit."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config.schema import ModelConfig
from ..model.network import DeformableDETRNetwork, NetworkT
from ..utils.errors import UserError
from .files import check_finite
from .key_mapping import Placements, from_reference_keys

# Config fields that the tensors of a `.pth` file may not tell, and what to suggest for them.
STATED = {"num_heads": 8, "num_queries": 300, "dilation": "false", "position_encoding": "sine"}
# The only values that the official code and transformers support.
SUPPORTED: dict[str, tuple[object, ...]] = {
    "pre_norm": (False,),
    "class_aware_proposals": (False,),
    "query_init": ("box",),
    "iterative_query_pos": (False,),
    "decoder_norm": (False,),
    "box_eps": ((1e-5, 1e-5),),
    "position_encoding": ("sine", "learned"),
    "finest_stride": (8,),
    "masks": (False,),
    "roi_grid": (0,),
    "nms_iou": (None,),
}


@dataclass(frozen=True)
class Checkpoint:
    """A config and the tensors of a file under the keys of its format.

    Attributes:
        config: The network, with nothing to download.
        tensors: The tensors by the format's keys.
        path: File of the tensors.
        config_name: What describes the network, for errors: "config.json".
        placements: Returns where our tensors are among them.
        check_network: Raises UserError if the network, once built, is not the one that the file describes.
        notes: Lines for the user: which of several weights were taken, what was left out.
    """

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    path: Path
    config_name: str
    placements: Callable[[Iterable[str], ModelConfig], Placements] = lambda names, config: {
        name: [(name,)] for name in names
    }
    check_network: Callable[[DeformableDETRNetwork], None] = lambda network: None
    notes: tuple[str, ...] = ()

    def build(self, network_class: type[NetworkT], **trained: Any) -> tuple[NetworkT, dict[str, Tensor]]:
        """Build the network; return it and its state dict to load. Raises UserError if the tensors do not fit it.

        trained: Fields of the config to change that only training reads, such as frozen_stages.
        """
        self._check_sizes()
        network = network_class(self.config.replace(**trained))
        self.check_network(network)
        expected = network.state_dict()
        placements = self.placements(expected, self.config)
        check_finite(self.tensors, self.path)
        return network, from_reference_keys(self.tensors, placements, expected, self.path, self.config_name)

    def _check_sizes(self) -> None:
        """Refuse a config whose sizes exceed all sizes of the tensors before it allocates memory."""
        config, shape = self.config, self.config.backbone_shape
        points = max(config.decoder_points, config.encoder_points if config.encoder_layers else 0)
        fields = ("hidden_dim", "ffn_dim", "encoder_layers", "decoder_layers", "num_classes")
        sizes = {field: getattr(config, field) for field in fields} | {
            "num_queries": 0 if config.two_stage and config.query_init != "learned" else config.num_queries,
            "heads × levels × points": config.num_heads * config.num_feature_levels * points,
            "backbone_shape": max(shape.stem, *shape.widths, sum(shape.depths)) if shape else 0,
        }
        largest = max(len(self.tensors), *(size for value in self.tensors.values() for size in value.shape))
        for name, size in sizes.items():
            if size > largest:
                raise UserError(f"{self.path}: no tensor is as large as {name} {size} of {self.config_name}")


def check_supported(config: ModelConfig, supported: Mapping[str, tuple[object, ...]], target: str, preset: str) -> None:
    """Raise UserError, naming the fields, if a config has other values than the only ones that a format supports.

    preset: One that the format supports, for the hint.
    """
    values = config.model_dump(include=set(supported))
    other = [f"{name}: {value}" for name, value in values.items() if value not in supported[name]]
    if other:
        raise UserError(f"{target} does not support {', '.join(other)}; fine-tune as --preset {preset}")


def restore_own_fields(config: ModelConfig, saved: Any, fields: tuple[str, ...]) -> ModelConfig:
    """Take what a foreign format cannot express from our own config that was saved with the weights.

    Class names and category ids are taken as well if the names still are those of `config`. A config that cannot be
    read, or does not fit, is ignored: another release wrote it, and the weights are complete without it.
    """
    try:
        own = ModelConfig.from_dict(saved).without_pretrained_backbone()
        if (own.class_names or default_class_names(own.num_classes)) == config.class_names:
            fields = (*fields, "class_names", "category_ids")
        return config.replace(**{field: getattr(own, field) for field in fields})
    except UserError:
        return config


def default_class_names(count: int) -> tuple[str, ...]:
    """Return the names that transformers gives to unnamed classes."""
    return tuple(f"LABEL_{label}" for label in range(count))


class UntoldFieldsError(UserError):
    """A file does not tell some config fields, and nobody stated them."""

    def __init__(self, path: Path, fields: list[str]) -> None:
        self.fields = fields
        options = " ".join(f"--set model.{name}={STATED[name]}" for name in fields)
        hint = f"state the values of its training in convert or train: {options}"
        super().__init__(f"{path} does not tell {' and '.join(fields)}; {hint}")


def stated_fields(
    path: Path, told: Mapping[str, Any], stated: Mapping[str, Any], needed: tuple[str, ...], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields that a file does not tell, as stated by the user, else as in `defaults`.

    Raises UserError if a `needed` field is missing or a number is not a positive integer.
    """
    fields = {name: value for name, value in {**defaults, **stated}.items() if name not in told}
    for name in ("num_heads", "num_queries"):
        if name in fields and (type(fields[name]) is not int or fields[name] < 1):
            raise UserError(f"model.{name} must be a positive integer, not {fields[name]!r}")
    if missing := [name for name in needed if name not in told and name not in fields]:
        raise UntoldFieldsError(path, missing)
    return fields


def coco_classes(count: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return names and category ids of 91 labels (COCO's ids) or 80 (COCO's classes); other counts have no names."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = ("N/A", *FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:])
    if count == 91:
        return names, tuple(range(91))
    if count == 80:
        ids = tuple(i for i, name in enumerate(names) if name != "N/A")
        return tuple(names[i] for i in ids), ids
    return (), tuple(range(count))


def coco_labels(names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return names and COCO's category ids of labels that are its classes; ids are () for other labels.

    Releases name up to six classes as VOC does (tvmonitor). 91 labels without names are COCO's ids.
    """
    coco, ids = coco_classes(len(names))
    if len(names) == 91 and all(name == f"LABEL_{label}" for label, name in enumerate(names)):
        return coco, ids
    equal = sum(name == other != "N/A" for name, other in zip(names, coco, strict=False))
    return names, ids if equal >= 74 else ()
