"""The backbone, any timm model, and the feature maps of all levels made from it (appendix A.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.schema import ModelConfig
from ..utils.errors import UserError, first_line
from ..utils.packages import quiet_loggers
from .frozen_norm import freeze_batch_norms
from .resnet import ResNet

STRIDES = (8, 16, 32)  # the levels that the backbone itself gives; coarser ones are made by convolution


class Backbone(nn.Module):
    """Feature maps of a timm model, or of a ResNet in the config's `backbone_shape`.

    (B, 3, H, W) → a map (B, channels[l], H_l, W_l) for each level l.

    Raises UserError for a model that timm does not know or that has no such maps, and for weights that cannot be had
    or do not fit.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        levels = min(config.num_feature_levels, len(STRIDES))
        body, stages = _features(config, STRIDES[-levels:])
        self.channels: tuple[int, ...] = tuple(body.feature_info.channels())
        pretrained = config.backbone_weights != "none"
        norm = config.backbone_norm
        if norm == "frozen" or (norm == "auto" and pretrained):
            body = freeze_batch_norms(body)
        count = config.frozen_stages if config.frozen_stages is not None else (2 if pretrained else 0)
        _freeze_stages(body, stages, count, config.backbone)
        # Convolutions are faster with the channels last, and tokens come out of such maps without a copy.
        self.body = body.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        if not torch.compiler.is_exporting():  # a graph leaves the layout to what runs it
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            if self.training and len(pixels) == 1 and max(pixels.shape[2:]) <= STRIDES[-1]:
                with _running_statistics(self.body):
                    return self.body(pixels)
        return self.body(pixels)


@contextmanager
def _running_statistics(body: nn.Module) -> Iterator[None]:
    """Batch norms as in evaluation: the last map has one value a channel, whose mean and variance say nothing."""
    norms = [module for module in body.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    learning = [norm for norm in norms if norm.training]
    for norm in learning:
        norm.eval()
    try:
        yield
    finally:
        for norm in learning:
            norm.train()


class InputProjection(nn.Module):
    """Backbone maps → `num_feature_levels` maps of C channels, the coarser ones by 3×3 convolutions of stride 2."""

    def __init__(self, config: ModelConfig, channels: tuple[int, ...]) -> None:
        super().__init__()
        C = config.hidden_dim
        groups = math.gcd(32, C)  # 32 in the paper; widths that it does not divide take what does
        convolutions = [nn.Conv2d(c, C, 1) for c in channels]
        width = channels[-1]
        for _ in range(config.num_feature_levels - len(channels)):
            convolutions.append(nn.Conv2d(width, C, 3, stride=2, padding=1))
            width = C
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.constant_(convolution.bias, 0.0)  # type: ignore[arg-type]  # there is one
        self.levels = nn.ModuleList(nn.Sequential(layer, nn.GroupNorm(groups, C)) for layer in convolutions)
        self.levels.to(memory_format=torch.channels_last)  # as the maps are: else the largest weights are reordered

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        maps = [_normed(project, x) for project, x in zip(self.levels, features, strict=False)]
        x = features[-1]
        for project in self.levels[len(features) :]:
            x = _normed(project, x)
            maps.append(x)
        return maps


def _normed(project: nn.Module, x: Tensor) -> Tensor:
    """Convolution and GroupNorm, the latter on contiguous maps: with the channels last, PyTorch's CPU kernel takes the
    variance as a difference of squares, which cost a tenfold error here.
    """
    convolution, norm = project.children()
    return norm(convolution(x).contiguous())


def pixel_statistics(config: ModelConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """RGB mean and deviation in 0..1: the config's, else what the backbone was trained with, else ImageNet's."""
    import timm

    known = None if config.backbone_shape else timm.get_pretrained_cfg(config.backbone)
    mean = config.pixel_mean or (known.mean if known else (0.485, 0.456, 0.406))
    std = config.pixel_std or (known.std if known else (0.229, 0.224, 0.225))
    return tuple(mean), tuple(std)


def _features(config: ModelConfig, strides: tuple[int, ...]) -> tuple[Any, list[dict[str, Any]]]:
    """The timm model cut to its maps at `strides`, with weights, and timm's list of all its stages."""
    import timm

    if config.backbone_shape is not None:
        try:
            body = ResNet(config.backbone_shape, strides if len(strides) > 1 else None)
        except ValueError as error:
            raise UserError(
                f"backbone_shape gives {error}; {config.num_feature_levels} feature levels need that"
            ) from None
        return body, body.feature_info.info
    name, source = config.backbone, config.backbone_weights
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5])
        raise UserError(f"backbone '{name}' is no timm model" + (f"; similar: {close}" if close else ""))
    options: dict[str, Any] = {"output_stride": 16} if config.dilation else {}
    try:
        probe: Any = timm.create_model(name, features_only=True, **options)
        stages = probe.feature_info.info
    except (RuntimeError, AttributeError, TypeError, NotImplementedError, AssertionError) as error:
        what = "dilated feature maps (DC5)" if config.dilation else "feature maps"
        raise UserError(f"backbone '{name}' gives no {what}: {first_line(error)}") from None
    last = max(stage["reduction"] for stage in stages)
    wanted = (last,) if len(strides) == 1 else strides
    by_stride = {stage["reduction"]: index for index, stage in enumerate(stages)}  # the deepest of each stride
    if any(stride not in by_stride for stride in wanted):
        raise UserError(f"backbone '{name}' has maps at strides {sorted(by_stride)}, not all of {list(wanted)}")
    options |= {"features_only": True, "out_indices": tuple(by_stride[stride] for stride in wanted)}
    if source == "none":
        return timm.create_model(name, **options), stages
    if source == "hub":
        try:
            with quiet_loggers("timm", "huggingface_hub"):
                return timm.create_model(name, pretrained=True, **options), stages
        except Exception as error:  # whatever the hub's client, the network or the file raise
            raise UserError(
                f"weights of backbone '{name}' could not be fetched ({first_line(error).split('. ')[0]}); "
                "give --backbone-weights PATH (safetensors in timm's names) or none"
            ) from None
    return _from_file(name, Path(source), options), stages


def _from_file(name: str, path: Path, options: dict[str, Any]) -> Any:
    import timm

    if not path.is_file():
        raise UserError(f"backbone weights {path}: no such file")
    fresh = timm.create_model(name, **options).state_dict()
    try:
        with quiet_loggers("timm", "huggingface_hub"):
            body = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **options)
    except Exception as error:  # whatever the reader of the file raises: it is the file that is wrong
        raise UserError(f"backbone weights {path} are not those of timm's '{name}': {first_line(error)}") from None
    # timm loads feature extractors leniently: a file of another model would leave the random start in place.
    missed = [key for key, value in body.state_dict().items() if value.ndim > 1 and torch.equal(value, fresh[key])]
    if missed:
        raise UserError(f"backbone weights {path} are not those of timm's '{name}': no values for {missed[0]}")
    return body


def _freeze_stages(body: nn.Module, stages: list[dict], count: int, name: str) -> None:
    """No gradient for the first `count` stages and all that comes before them."""
    if not count:
        return
    if count > len(stages):
        raise UserError(f"frozen_stages {count}: backbone '{name}' has {len(stages)} stages")
    last = stages[count - 1]["module"]
    names = [module_name for module_name, _ in body.named_modules()]
    # A list of features renames nested modules: blocks.1 becomes blocks_1.
    ends = [i for i, n in enumerate(names) if n == last or n.startswith((f"{last}.", last.replace(".", "_")))]
    if not ends:
        raise UserError(f"frozen_stages: backbone '{name}' has no module '{last}'; set frozen_stages to 0")
    for module_name in names[: max(ends) + 1]:
        for parameter in body.get_submodule(module_name).parameters(recurse=False):
            parameter.requires_grad_(False)
