"""Fine-tune transformers' detectors: their config, and their weights for other classes."""

import os
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import torch

from ..config.detector import AdapterConfig
from ..config.schema import Config, DataConfig, TrainConfig
from ..model.heads import PRIOR_LOGIT
from ..utils.errors import UserError
from ..utils.terminal import echo
from ..weights.finetune import TransferReport, matching_classes
from .detector import TransformersDetector, architecture, family_of, read_config
from .families import scores_objects


def finetune_config(source: str | os.PathLike[str]) -> Config:
    """Return the config to fine-tune a repository: its network and its family's recipe.

    The classes are left out: they come from the dataset. Epochs and evaluations depend on the dataset's size, and the
    new class heads get a warm-up. Raises UserError as `TransformersDetector.from_pretrained`.
    """
    config = read_config(source)
    family = family_of(config)
    model = config.replace(num_classes=1, class_names=(), category_ids=())
    data = DataConfig.from_dict(family.data)
    if model.resize != "fixed":
        data = data.replace(zoom_out_prob=0.0)
    common = {"epochs": "auto", "eval_every": "auto", "lr_schedule": "cosine", "warmup_steps": 100}
    train = TrainConfig.from_dict({**common, "sampling_lr_mult": 1.0, **family.train})
    return Config(preset=model.family, model=model, data=data, train=train)


def load_for_finetuning(
    config: AdapterConfig, source: str | os.PathLike[str], log: Callable[[str], object] = echo
) -> TransformersDetector:
    """Build a detector with `config` and copy the weights of `source` that fit.

    Rows of classes with the same name are copied; those of other classes start at the focal prior. Raises UserError if
    the source is of another family or lacks a setting of the network.
    """
    trained = TransformersDetector.from_pretrained(source)
    if trained.config.family != config.family:
        raise UserError(
            f"{source} is a {family_of(trained.config).title}, not a {family_of(config).title}; "
            "give the weights of the same family"
        )
    _check_settings(config.network, trained.network.config, family_of(config).title)
    model = TransformersDetector(config)
    report = TransferReport()
    own, state = model.network.state_dict(), _assign_proposal_heads(trained.network, model.network)
    if config.masks != trained.config.masks:  # a network with masks is around one without
        state = {f"model.{name}" if config.masks else name.removeprefix("model."): state[name] for name in state}
    rows = matching_classes(trained.config.class_names, config.class_names)
    same = trained.config.class_names == config.class_names
    heads, copied = family_of(config).class_heads, {}
    for name, value in own.items():
        theirs = state.get(name)
        is_head = not same and any(part in heads for part in name.split("."))
        if is_head and theirs is not None and theirs.shape[1:] == value.shape[1:]:
            kept = f"{config.num_classes} classes, the source has {trained.config.num_classes}"
            objectness = _is_proposal_head(name, model.network)
            copied[name] = _class_rows(value, theirs, [(0, 0)] if objectness else rows)
            if objectness:
                report.partial[name] = f"{kept}; kept its score of 'object'"
            elif rows:
                report.partial[name] = f"{kept}; kept {len(rows)} of the same name"
            else:
                report.initialized[name] = f"{kept}, none of the same name"
        elif theirs is not None and theirs.shape == value.shape:
            copied[name] = theirs
            report.loaded.append(name)
        elif not name.endswith("num_batches_tracked"):  # frozen norms have no such counter
            shape = "" if theirs is None else f", in the source {tuple(theirs.shape)}"
            report.initialized[name] = f"shape {tuple(value.shape)}{shape}"
    report.unused = {name: "not in this model" for name in state if name not in own}
    model.network.load_state_dict(own | copied)
    for line in report.lines(os.fspath(source)):
        log(line)
    return model


def _check_settings(values: Mapping[str, Any], known: Any, title: str, prefix: str = "model.network.") -> None:
    """Raise UserError about a setting that transformers' config `known` lacks, also of a backbone of the same type."""
    names = architecture(known.to_dict())
    for key, value in values.items():
        if key not in names:
            close = get_close_matches(key, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"{prefix}{key}: {title} has no such setting{hint}")
        part: Any = getattr(known, key, None)
        if isinstance(value, dict) and hasattr(part, "to_dict") and value.get("model_type") == part.model_type:
            _check_settings(value, part, part.model_type, f"{prefix}{key}.")


def _proposal_head(network: Any) -> str | None:
    """Return the index of the heads for proposals, scored by column 0: of Deformable DETR with two stages."""
    return str(network.config.decoder_layers) if scores_objects(network.config) else None


def _is_proposal_head(name: str, network: Any) -> bool:
    return name.split(".")[-3:-1] == ["class_embed", _proposal_head(network)]


def _assign_proposal_heads(source: Any, target: Any) -> dict[str, torch.Tensor]:
    """Return the source's tensors with its proposal heads at the target's index, or without if it has none."""
    old, new = _proposal_head(source), _proposal_head(target)
    head = re.compile(rf"(?<=_embed\.){old}(?=\.)")
    state = source.state_dict()
    return {head.sub(str(new), name): value for name, value in state.items() if new or not head.search(name)}


def _class_rows(own: torch.Tensor, source: torch.Tensor, rows: list[tuple[int, int]]) -> torch.Tensor:
    """Return a class head with the rows (own, source) copied; others keep their weights, biases get the focal prior."""
    head = own.clone()
    if head.dim() == 1:
        head.fill_(PRIOR_LOGIT)
    for row, source_row in rows:
        head[row] = source[source_row]
    return head
