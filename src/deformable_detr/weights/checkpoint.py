"""Weights as read from a file in any format, and the network that they fit."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config.schema import ModelConfig
from ..model.network import DeformableDETRNetwork, NetworkT
from ..utils.errors import UserError
from .key_mapping import Placements, from_reference_keys

# What the official code and transformers can do only one way.
SUPPORTED = {"pre_norm": False, "class_aware_proposals": False, "query_init": "box", "iterative_query_pos": False}


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
    """

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    path: Path
    config_name: str
    placements: Callable[[Iterable[str], ModelConfig], Placements] = lambda names, config: {
        name: [(name,)] for name in names
    }
    check_network: Callable[[DeformableDETRNetwork], None] = lambda network: None

    def build(self, network_class: type[NetworkT]) -> tuple[NetworkT, dict[str, Tensor]]:
        """Build the network; return it and its state dict to load. Raises UserError if the tensors do not fit it."""
        self._check_sizes()
        network = network_class(self.config)
        self.check_network(network)
        expected = network.state_dict()
        placements = self.placements(expected, self.config)
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


def check_supported(config: ModelConfig, supported: Mapping[str, object], target: str, preset: str) -> None:
    """Raise UserError, naming the fields, if a config has other values than the only ones that a format supports.

    preset: One that the format supports, for the hint.
    """
    values = config.model_dump(include=set(supported))
    other = [f"{name}: {value}" for name, value in values.items() if value != supported[name]]
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
