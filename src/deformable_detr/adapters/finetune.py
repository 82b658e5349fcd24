"""Fine-tune transformers' detectors: their config, and their weights for other classes."""

import os
from collections.abc import Callable
from difflib import get_close_matches

import torch

from ..config.detector import AdapterConfig
from ..config.schema import Config, DataConfig, TrainConfig
from ..model.heads import PRIOR_LOGIT
from ..utils.errors import UserError
from ..weights.finetune import TransferReport, matching_classes
from .detector import TransformersDetector, family_of, read_config
from .families import Family


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
    config: AdapterConfig, source: str | os.PathLike[str], log: Callable[[str], object] = print
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
    if unknown := [key for key in config.network if key not in trained.config.network]:
        close = get_close_matches(unknown[0], trained.config.network, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"model.network.{unknown[0]}: {family_of(config).title} has no such setting{hint}")
    model = TransformersDetector(config)
    report = TransferReport()
    own, state = model.network.state_dict(), trained.network.state_dict()
    rows = matching_classes(trained.config.class_names, config.class_names)
    same = trained.config.class_names == config.class_names
    copied = {}
    for name, value in own.items():
        theirs = state.get(name)
        if theirs is not None and _is_class_head(name, family_of(config)) and not same:
            copied[name] = _class_rows(value, theirs, rows)
            kept = f"{config.num_classes} classes, the source has {trained.config.num_classes}"
            if rows:
                report.partial[name] = f"{kept}; kept {len(rows)} of the same name"
            else:
                report.initialized[name] = f"{kept}, none of the same name"
        elif theirs is not None and theirs.shape == value.shape:
            copied[name] = theirs
            report.loaded.append(name)
        else:
            shape = "" if theirs is None else f", in the source {tuple(theirs.shape)}"
            report.initialized[name] = f"shape {tuple(value.shape)}{shape}"
    report.unused = {name: "not in this model" for name in state if name not in own}
    model.network.load_state_dict(own | copied)
    for line in report.lines(os.fspath(source)):
        log(line)
    return model


def _is_class_head(name: str, family: Family) -> bool:
    return any(part in family.class_heads for part in name.split("."))


def _class_rows(own: torch.Tensor, source: torch.Tensor, rows: list[tuple[int, int]]) -> torch.Tensor:
    """Return a class head with the rows (own, source) copied; others keep their weights, biases get the focal prior."""
    head = own.clone()
    if head.dim() == 1:
        head.fill_(PRIOR_LOGIT)
    for row, source_row in rows:
        head[row] = source[source_row]
    return head
