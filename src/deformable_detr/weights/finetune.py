"""Fine-tuning: a new model starts from the weights of another one, as far as they fit."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..config import presets
from ..config.schema import Config, ModelConfig
from ..model.network import DeformableDETRNetwork, N
from ..utils.errors import UserError
from .load import read
from .resize import resized

_HEAD = re.compile(r"decoder\.heads\.(classes|boxes)\.(\d+)\.(.+)")
_PRIOR = -math.log(99)  # every class starts with probability 1% (see model/heads.py)
_NAMELESS = re.compile(r"n/a|label_\d+|class \d+")  # stand-ins that say nothing of what a class is
# What the data set and the run decide, whatever the source has.
_NOT_INHERITED = {"class_names", "category_ids", "num_classes", "backbone_weights", "gradient_checkpointing"}


@dataclass
class TransferReport:
    """What happened to each tensor of the new model, and to those of the source.

    loaded: names taken as they are. partly, fresh: names of which a part or nothing was taken, and why.
    unused: names of the source that the model has no use for, and why. classes: names whose rows were kept.
    """

    loaded: list[str] = field(default_factory=list)
    partly: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)

    def lines(self, source: str | os.PathLike[str]) -> list[str]:
        """The report, a line for each group of tensors with the same reason."""
        count = len(self.loaded) + len(self.partly) + len(self.fresh)
        out = [f"weights of {source}: {len(self.loaded)} of {count} tensors loaded"]
        for title, group in (("partly", self.partly), ("new", self.fresh), ("left out", self.unused)):
            reasons: dict[str, list[str]] = {}
            for name, why in group.items():
                reasons.setdefault(why, []).append(name)
            for why, names in reasons.items():
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                out.append(f"  {title}: {names[0]}{more} ({why})")
        return out


def starting_config(source: str | os.PathLike[str]) -> Config:
    """The config to fine-tune a source with: its network and image size, and the training of the preset it is like.

    Its classes are left out: they are the data set's. Raises UserError as `source.load` does.
    """
    found, _, _ = read(source)
    kept = {name: value for name, value in found.model_dump().items() if name not in _NOT_INHERITED}
    model = ModelConfig.from_dict({**kept, "backbone_weights": "none"}, f"the network of {source}")
    alike = (
        "num_feature_levels",
        "dilation",
        "refine",
        "two_stage",
        "class_aware_proposals",
        "query_init",
        "iterative_query_pos",
    )

    def likeness(name: str) -> tuple[bool, int, int]:
        preset = presets.PRESETS[name]()
        same = {field for field in alike if getattr(preset, field) == getattr(model, field)}
        return "two_stage" in same, len(same), _shared(preset, model)

    nearest = max(presets.PRESETS, key=likeness)
    return presets.config(nearest).replace(model=model)


def begin(
    config: ModelConfig,
    source: str | os.PathLike[str],
    say: Callable[[str], object] = print,
    network_class: type[N] = DeformableDETRNetwork,
) -> N:
    """A new model with `config` that starts from the weights of `source`, as `load_for_training` takes them.

    Pretrained weights of the backbone are only fetched where the source has another backbone.
    """
    found = read(source)
    model = network_class(config.without_pretrained_backbone() if _base(found[0]) == _base(config) else config)
    _transfer(model, found[0], found[1], source, say)
    return model


def load_for_training(
    model: DeformableDETRNetwork, source: str | os.PathLike[str], say: Callable[[str], object] = print
) -> TransferReport:
    """Copies everything whose shape fits from `source` (see `source.load`) into a new model.

    Where the classes differ, class heads start at the focal prior but for the rows of classes of the same name. Queries
    and feature levels that the source lacks keep the model's own values, as does all that does not fit.

    say: gets the report line by line. Raises UserError for a source that cannot be read and where nothing fits.
    """
    config, state, _ = read(source)
    return _transfer(model, config, state, source, say)


def _transfer(
    model: DeformableDETRNetwork,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    source: str | os.PathLike[str],
    say: Callable[[str], object],
) -> TransferReport:
    own = model.state_dict()
    report = TransferReport()
    state, new = resized(_paired(state, config, model.config), config, model)
    if _base(config) != _base(model.config):
        for name in [name for name in state if name.startswith("backbone.")]:
            report.unused[name] = f"its backbone is {config.backbone}, not {model.config.backbone}"
            del state[name]
    heads = _class_rows(state, own, config, model.config, report)
    taken: dict[str, Tensor] = {}
    for name, value in own.items():
        if name in heads:
            taken[name] = heads[name]
        elif name not in state:
            if not name.endswith("num_batches_tracked"):
                report.fresh[name] = "not in the source"
        elif state[name].shape != value.shape:
            shapes = f"{tuple(state[name].shape)} there, {tuple(value.shape)} here"
            report.fresh[name] = f"other shape: {shapes}"
        else:
            taken[name] = state[name]
            if name in new:
                report.partly[name] = f"new: {new[name]}"
            else:
                report.loaded.append(name)
    report.unused |= {
        name: "not in this model" for name in state if name not in own and not name.endswith("num_batches_tracked")
    }
    if not any(own[name].ndim > 1 for name in report.loaded):  # a bias may fit by chance
        raise UserError(
            f"nothing of {source} fits this model: hidden_dim {config.hidden_dim} and backbone {config.backbone} "
            f"there, {model.config.hidden_dim} and {model.config.backbone} here"
        )
    model.load_state_dict({**own, **{name: value.to(own[name].dtype) for name, value in taken.items()}})
    for line in report.lines(source):
        say(line)
    return report


def _shared(preset: ModelConfig, model: ModelConfig) -> int:
    """Of how many settings two networks have the same value."""
    return sum(value == getattr(model, name) for name, value in preset.model_dump().items())


def _base(config: ModelConfig) -> object:
    return config.backbone_shape or config.backbone.split(".")[0]


def _paired(state: Mapping[str, Tensor], config: ModelConfig, target: ModelConfig) -> dict[str, Tensor]:
    """The tensors with the heads of the target's number: of each decoder layer, and of the encoder's proposals.

    Where the source's layers share one pair, each layer of the target gets it.
    """
    out = {name: value for name, value in state.items() if not _HEAD.match(name)}
    layers = target.decoder_layers if target.refine else 1
    sources = {layer: (layer if config.refine else 0) for layer in range(layers)}
    if target.two_stage and config.two_stage:
        sources[target.decoder_layers] = config.decoder_layers
    last = config.decoder_layers - 1 if config.refine else 0
    if not target.refine:
        sources[0] = last  # the one pair reads all layers, so the source's last one is nearest
    heads: dict[int, list[tuple[str, str, Tensor]]] = {}
    for name, value in state.items():
        if match := _HEAD.match(name):
            heads.setdefault(int(match[2]), []).append((match[1], match[3], value))
    for here, there in sources.items():
        if there > last and here != target.decoder_layers:
            continue
        for kind, rest, value in heads.get(there, []):
            out[f"decoder.heads.{kind}.{here}.{rest}"] = value
    return out


def _class_rows(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    config: ModelConfig,
    target: ModelConfig,
    report: TransferReport,
) -> dict[str, Tensor]:
    """The class heads: none of them here where they mean the same, so that they are taken as they are."""
    same = _same_classes(config, target)
    rows = [(row, row) for row in range(target.num_classes)] if same else _same_names(config, target)
    names = target.class_names or [str(row) for row in range(target.num_classes)]
    report.classes = [] if same else [names[here] for here, _ in rows]
    heads: dict[str, Tensor] = {}
    for name, value in own.items():
        match = _HEAD.match(name)
        if match is None or match[1] != "classes":
            continue
        source, pairs = state.get(name), list(rows)
        of_encoder = target.two_stage and int(match[2]) == target.decoder_layers
        # The encoder's column 0 says "object", whatever the first class is called, or each column its class.
        other = of_encoder and config.two_stage and config.class_aware_proposals != target.class_aware_proposals
        if same and not other:
            continue
        if of_encoder and not target.class_aware_proposals:
            pairs = [(0, 0)]
        if source is None or source.shape[1:] != value.shape[1:] or other:
            pairs = []
        made = value.clone()
        if match[3] == "bias":
            made.fill_(_PRIOR)
        for here, there in pairs:
            made[here] = source[there].to(made.dtype) if source is not None else made[here]
        heads[name] = made
        kept = "its score of 'object'" if pairs == [(0, 0)] and of_encoder else f"{len(pairs)} classes of the same name"
        reason = f"{len(value)} classes, {config.num_classes} in the source"
        if pairs:
            report.partly[name] = f"{reason}; kept {kept}, the rest starts at the prior"
        elif other:
            report.fresh[name] = (
                f"another score with class_aware_proposals {config.class_aware_proposals} in the source; at the prior"
            )
        else:
            report.fresh[name] = f"{reason}; none of the same name, all start at the prior"
    return heads


def _same_classes(config: ModelConfig, target: ModelConfig) -> bool:
    if config.num_classes != target.num_classes:
        return False
    if config.class_names and target.class_names:
        return [_key(name) for name in config.class_names] == [_key(name) for name in target.class_names]
    return not config.class_names and not target.class_names


def _same_names(config: ModelConfig, target: ModelConfig) -> list[tuple[int, int]]:
    """(row here, row there) of each class that both have."""
    known = {_key(name): row for row, name in reversed(list(enumerate(config.class_names)))}
    pairs = [(row, known.get(_key(name))) for row, name in enumerate(target.class_names)]
    return [
        (here, there)
        for here, there in pairs
        if there is not None and not _NAMELESS.fullmatch(_key(target.class_names[here]))
    ]


def _key(name: str) -> str:
    return " ".join(name.casefold().split())
