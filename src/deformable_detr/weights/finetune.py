"""Fine-tuning: start a new model from the weights of another, as far as they fit."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import presets
from ..config.schema import Config, ModelConfig
from ..model.heads import PRIOR_LOGIT
from ..model.network import DeformableDETRNetwork, NetworkT
from ..utils.errors import UserError
from ..utils.terminal import echo
from .checkpoint import STATED, Checkpoint, UntoldFieldsError
from .load import read_checkpoint
from .resize import resize_state

_HEAD = re.compile(r"decoder\.heads\.(classes|boxes)\.(\d+)\.(.+)")
_COUNTER = "num_batches_tracked"  # of batch norms; nothing reads it
_PLACEHOLDER_NAME = re.compile(r"n/a|label_\d+|class \d+")
# Fields that the dataset and the run decide.
_NOT_INHERITED = {"class_names", "category_ids", "num_classes", "backbone_weights", "gradient_checkpointing"}


@dataclass
class TransferReport:
    """What each tensor of a new model was initialized from.

    Attributes:
        loaded: Tensors copied from the source.
        partial: Tensors copied in part, and which part is new.
        initialized: Tensors with initial values, and why.
        unused: Tensors of the source that were not copied, and why.
    """

    loaded: list[str] = field(default_factory=list)
    partial: dict[str, str] = field(default_factory=dict)
    initialized: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)

    def lines(self, path: str | Path) -> list[str]:
        """Return the report on the weights of `path`, with one line per group of tensors that have the same reason."""
        count = len(self.loaded) + len(self.partial) + len(self.initialized)
        lines = [f"loaded {len(self.loaded)} of {count} tensors from {path}"]
        for title, group in (("partial", self.partial), ("new", self.initialized), ("unused", self.unused)):
            names_by_reason: dict[str, list[str]] = {}
            for name, reason in group.items():
                names_by_reason.setdefault(reason, []).append(name)
            for reason, names in names_by_reason.items():
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                lines.append(f"  {title}: {names[0]}{more} ({reason})")
        return lines


def finetune_config(source: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> Config:
    """Return the config to fine-tune a source: its network, with the training settings of the most similar preset.

    The classes are left out: they come from the dataset. Raises UserError as `load_pretrained` does.

    changes: Fields of `ModelConfig` that the user sets; used only for what a `.pth` without settings does not tell.
    """
    inherited = read_checkpoint(source, _stated(changes or {})).config.model_dump(exclude=_NOT_INHERITED)
    model = ModelConfig.from_dict({**inherited, "backbone_weights": "none"}, f"the network of {source}")

    def similarity(name: str) -> int:
        preset = presets.PRESETS[name]()
        return sum(getattr(preset, field) == getattr(model, field) for field in ModelConfig.model_fields)

    return presets.config(max(presets.PRESETS, key=similarity)).replace(model=model)


def load_for_finetuning(
    config: ModelConfig,
    source: str | os.PathLike[str],
    log: Callable[[str], object] = echo,
    network_class: type[NetworkT] = DeformableDETRNetwork,
) -> NetworkT:
    """Build a network with `config` and initialize it with `transfer_weights`, whose report is logged.

    Pretrained backbone weights are downloaded only if the source has another backbone.
    """
    try:
        checkpoint = read_checkpoint(source)
    except UntoldFieldsError as error:
        values = ", ".join(f"{name} {getattr(config, name)}" for name in error.fields)
        log(f"{source} does not tell {' and '.join(error.fields)}: read with this run's {values}")
        checkpoint = read_checkpoint(source, _stated(config.model_dump()))
    same_backbone = _backbone(checkpoint.config) == _backbone(config)
    model = network_class(config.without_pretrained_backbone() if same_backbone else config)
    for line in (*checkpoint.notes, *transfer_weights(model, checkpoint).lines(checkpoint.path)):
        log(line)
    return model


def transfer_weights(model: DeformableDETRNetwork, checkpoint: Checkpoint) -> TransferReport:
    """Copy every tensor of a checkpoint that fits into a new model.

    If the classes differ, class heads start at the focal prior; rows of classes with the same name are copied. Queries
    and feature levels that the checkpoint lacks keep their initial values.
    Raises UserError if the checkpoint is damaged or nothing of it fits.
    """
    config, target = checkpoint.config, model.config
    state = _assign_heads(checkpoint.build(DeformableDETRNetwork, frozen_stages=0)[1], config, target)
    state, extensions = resize_state(state, config, model)
    report = TransferReport()
    if _backbone(config) != _backbone(target):
        reason = f"the source's backbone is {config.backbone}, not {target.backbone}"
        report.unused = {name: reason for name in state if name.startswith("backbone.")}
    state = {name: value for name, value in state.items() if name not in report.unused}
    own = {name: value for name, value in model.state_dict().items() if not name.endswith(_COUNTER)}
    copied = _class_heads(state, own, config, target, report)
    for name, value in own.items():
        if name in copied:
            continue
        if name not in state:
            report.initialized[name] = "not in the source"
        elif state[name].shape != value.shape:
            report.initialized[name] = f"shape {tuple(value.shape)}, in the source {tuple(state[name].shape)}"
        else:
            copied[name] = state[name]
            if name in extensions:
                report.partial[name] = f"new: {extensions[name]}"
            else:
                report.loaded.append(name)
    report.unused |= {name: "not in this model" for name in state if name not in own and not name.endswith(_COUNTER)}
    if not any(own[name].ndim > 1 for name in report.loaded):  # a bias may fit by chance
        raise UserError(f"no weights of {checkpoint.path} fit this model: their hidden_dim is {config.hidden_dim}")
    model.load_state_dict(model.state_dict() | copied)
    return report


def _stated(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in STATED if name in fields}


def matching_classes(source: Sequence[str], target: Sequence[str]) -> list[tuple[int, int]]:
    """Return (target label, source label) of the classes with the same name, apart from case and spaces."""
    names = list(map(_plain, source))
    return [
        (row, names.index(name))
        for row, name in enumerate(map(_plain, target))
        if name in names and not _PLACEHOLDER_NAME.fullmatch(name)
    ]


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())


def _backbone(config: ModelConfig) -> object:
    return config.backbone_shape or config.backbone.split(".")[0]


def _assign_heads(state: Mapping[str, Tensor], config: ModelConfig, target: ModelConfig) -> dict[str, Tensor]:
    """Rename the heads to the target's: one pair per decoder layer or a shared one, the encoder's and the RoI head's.

    Each layer of the target gets the source's shared pair; a shared pair of the target gets the last layer's. A new RoI
    head gets the classes of the last layer, and starts without changing its boxes.
    """
    last = config.decoder_layers - 1 if config.refine else 0
    if target.refine:
        sources = {layer: layer if config.refine else 0 for layer in range(target.decoder_layers)}
        sources = {layer: source for layer, source in sources.items() if source <= last}
    else:
        sources = {0: last}
    if target.two_stage and config.two_stage:
        sources[target.decoder_layers] = config.decoder_layers
    roi = target.decoder_layers + int(target.two_stage) if target.roi_grid else None
    if roi is not None:
        sources[roi] = config.decoder_layers + int(config.two_stage) if config.roi_grid else last
    assigned = {name: value for name, value in state.items() if not _HEAD.match(name)}
    for name, value in state.items():
        if match := _HEAD.match(name):
            layers = [layer for layer, source in sources.items() if source == int(match[2])]
            if match[1] == "boxes" and not config.roi_grid:
                layers = [layer for layer in layers if layer != roi]
            assigned |= {f"decoder.heads.{match[1]}.{layer}.{match[3]}": value for layer in layers}
    return assigned


def _class_heads(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    config: ModelConfig,
    target: ModelConfig,
    report: TransferReport,
) -> dict[str, Tensor]:
    """Class heads at the prior, with the rows that can be copied; nothing for heads that mean the same in both."""
    names, target_names = (list(map(_plain, c.class_names)) for c in (config, target))
    same_classes = config.num_classes == target.num_classes and names == target_names
    matches = matching_classes(config.class_names, target.class_names)
    heads: dict[str, Tensor] = {}
    for name, value in own.items():
        match = _HEAD.match(name)
        if match is None or match[1] != "classes":
            continue
        is_encoder = target.two_stage and int(match[2]) == target.decoder_layers
        # Column 0 of the encoder's head scores "object", unless its proposals are class-aware.
        rescored = is_encoder and config.two_stage and config.class_aware_proposals != target.class_aware_proposals
        if same_classes and not rescored:
            continue
        objectness = is_encoder and not target.class_aware_proposals
        source = state.get(name)
        rows = [(0, 0)] if objectness else matches
        if rescored or source is None or source.shape[1:] != value.shape[1:]:
            rows = []
        heads[name] = value.clone().fill_(PRIOR_LOGIT) if match[3] == "bias" else value.clone()
        for row, source_row in rows:
            heads[name][row] = source[source_row].to(value.dtype)  # type: ignore[index]  # no source, no rows
        classes = f"{len(value)} classes, the source has {config.num_classes}"
        if rescored:
            report.initialized[name] = f"the source has class_aware_proposals {config.class_aware_proposals}"
        elif not rows:
            report.initialized[name] = f"{classes}, none of the same name"
        elif objectness:
            report.partial[name] = f"{classes}; kept its score of 'object'"
        else:
            report.partial[name] = f"{classes}; kept {len(rows)} of the same name"
    return heads
