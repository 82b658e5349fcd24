"""The backbone, any timm model, and the input projections to all feature levels (appendix A.2)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..config.schema import ModelConfig
from ..utils.errors import UserError, first_line
from ..utils.packages import quiet_loggers
from ..utils.progress import write_line
from .frozen_norm import freeze_batch_norms
from .resnet import ResNet


def backbone_strides(config: ModelConfig) -> tuple[int, ...]:
    """Return the strides of the levels that are the backbone's own; the input projections add coarser ones."""
    strides = (8, 16, 32) if config.finest_stride == 8 else (4, 8, 16, 32)
    return strides[-config.num_feature_levels :]


class Backbone(nn.Module):
    """Feature maps (B, channels[l], H_l, W_l) of a timm model, or of a ResNet with the config's `backbone_shape`.

    With masks or an RoI head, the first map has stride 4, also if it is not the map of a level.
    Raises UserError if timm has no such model, the model lacks maps at these strides, or its weights are missing or do
    not fit.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        body, stages = _feature_extractor(config, backbone_strides(config))
        self.channels: tuple[int, ...] = tuple(body.feature_info.channels())
        pretrained = config.backbone_weights != "none"
        norm = config.backbone_norm
        if norm == "frozen" or (norm == "auto" and pretrained):
            body = freeze_batch_norms(body)
        count = config.frozen_stages if config.frozen_stages is not None else (2 if pretrained else 0)
        _freeze_stages(body, stages, count, config.backbone)
        # Convolutions are faster in channels_last, and flattening such maps to tokens needs no copy.
        self.body = body.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the maps (B, channels[l], H_l, W_l) of pixels (B, 3, H, W), finest first."""
        if not torch.compiler.is_exporting():  # the runtime of an exported graph chooses its own layout
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        if not self.body.training or len(pixels) > 1 or max(pixels.shape[2:]) > 32:
            return self.body(pixels)
        self.body.eval()  # the last map has one value per channel, for which batch norms have no statistics
        try:
            return self.body(pixels)
        finally:
            self.body.train()


class InputProjection(nn.Module):
    """Project backbone maps to `num_feature_levels` maps of C channels.

    3×3 convolutions of stride 2 add the coarser ones.
    """

    def __init__(self, config: ModelConfig, channels: tuple[int, ...]) -> None:
        super().__init__()
        C = config.hidden_dim
        groups = math.gcd(32, C)  # 32 in the paper
        convolutions = [nn.Conv2d(c, C, 1) for c in channels]
        width = channels[-1]
        for _ in range(config.num_feature_levels - len(channels)):
            convolutions.append(nn.Conv2d(width, C, 3, stride=2, padding=1))
            width = C
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.constant_(convolution.bias, 0.0)  # type: ignore[arg-type]
        self.levels = nn.ModuleList(nn.Sequential(layer, nn.GroupNorm(groups, C)) for layer in convolutions)
        self.levels.to(memory_format=torch.channels_last)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Return L maps (B, C, H_l, W_l) from the backbone's maps, finest first."""
        maps = [_project(level, x) for level, x in zip(self.levels, features, strict=False)]
        x = features[-1]
        for level in self.levels[len(features) :]:
            x = _project(level, x)
            maps.append(x)
        return maps


def _project(level: nn.Module, x: Tensor) -> Tensor:
    """Convolve and normalize. GroupNorm gets contiguous maps: its channels_last kernel is ten times less exact."""
    convolution, norm = level.children()
    return norm(convolution(x).contiguous())


def pixel_statistics(config: ModelConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the RGB mean and standard deviation in 0..1: the config's, else the backbone's, else ImageNet's."""
    import timm

    pretrained = None if config.backbone_shape else timm.get_pretrained_cfg(config.backbone)
    mean = config.pixel_mean or (pretrained.mean if pretrained else (0.485, 0.456, 0.406))
    std = config.pixel_std or (pretrained.std if pretrained else (0.229, 0.224, 0.225))
    return tuple(mean), tuple(std)


def _feature_extractor(config: ModelConfig, strides: tuple[int, ...]) -> tuple[Any, list[dict[str, Any]]]:
    """Create the backbone with outputs at `strides`, also at 4 if a head reads it, and its weights; also return timm's
    list of all its stages.
    """
    import timm

    if config.backbone_shape is not None:
        depth = len(config.backbone_shape.depths)
        if len(strides) > 1 and depth < 4:
            raise UserError(f"backbone_shape has {depth} stages; num_feature_levels > 1 needs 4")
        indices = {depth} if len(strides) == 1 else set(range(5 - len(strides), 5))
        body = ResNet(config.backbone_shape, tuple(sorted(indices | {1} if config.reads_stride4 else indices)))
        return body, body.feature_info.info
    name, source = config.backbone, config.backbone_weights
    if not timm.is_model(name):
        similar = ", ".join(timm.list_models(f"*{name[:6]}*")[:5])
        raise UserError(f"backbone '{name}' is not a timm model" + (f"; similar: {similar}" if similar else ""))
    options: dict[str, Any] = {"output_stride": 16} if config.dilation else {}
    is_swin = name.startswith("swin_")
    if is_swin:
        from . import swin  # late, because it imports timm

        options |= swin.OPTIONS
    try:
        probe: Any = timm.create_model(name, features_only=True, **options)
        stages = probe.feature_info.info
    except (RuntimeError, AttributeError, TypeError, NotImplementedError, AssertionError) as error:
        feature = "dilated feature maps (DC5)" if config.dilation else "feature maps"
        raise UserError(f"backbone '{name}' does not support {feature}: {first_line(error)}") from None
    by_stride = {stage["reduction"]: index for index, stage in enumerate(stages)}  # the deepest per stride
    strides = (max(by_stride),) if len(strides) == 1 else strides
    levels = len(strides)
    if config.reads_stride4:
        strides = tuple(sorted({4, *strides}))
    if not by_stride.keys() >= set(strides):
        raise UserError(f"backbone '{name}' has maps at strides {sorted(by_stride)}; needed are {list(strides)}")
    options |= {"features_only": True, "out_indices": tuple(by_stride[stride] for stride in strides)}
    if source == "none":
        body = timm.create_model(name, **options)
        return (swin.SwinFeatures(body, levels) if is_swin else body), stages
    random_state = {}
    if source != "hub":
        # timm ignores missing keys of feature extractors, so compare with a model of the same random values.
        with torch.random.fork_rng(devices=[]):
            random_state = timm.create_model(name, **options).state_dict()
        options["pretrained_cfg_overlay"] = {"file": source}
    _announce_download(name, source, probe.pretrained_cfg)
    try:
        with quiet_loggers("timm", "huggingface_hub"):
            body = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # the hub client, the network and the file raise many types
        raise UserError(
            f"cannot load backbone weights {source} for timm's '{name}' ({first_line(error).split('. ')[0]}); "
            "set --backbone-weights to a safetensors file with timm's names, or to none"
        ) from None
    loaded = body.state_dict()
    for key, value in random_state.items():
        if value.ndim > 1 and torch.equal(value, loaded[key]):
            raise UserError(f"backbone weights {source} do not fit timm's '{name}': no values for {key}")
    return (swin.SwinFeatures(body, levels) if is_swin else body), stages


def _announce_download(name: str, source: str, settings: dict[str, Any]) -> None:
    """Say that timm will download the weights, unless they are a file or in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    repository = settings.get("hf_hub_id")
    if source == "hub" and repository and not try_to_load_from_cache(repository, "model.safetensors"):
        write_line(f"download the backbone weights of {name} ({repository})")


def _freeze_stages(body: nn.Module, stages: list[dict], count: int, name: str) -> None:
    """Disable gradients of the first `count` stages and of everything before them."""
    if not count:
        return
    if count > len(stages):
        raise UserError(f"frozen_stages {count}: backbone '{name}' has only {len(stages)} stages")
    last = stages[count - 1]["module"]
    names = [module_name for module_name, _ in body.named_modules()]
    # timm's feature lists rename nested modules: blocks.1 becomes blocks_1.
    ends = [i for i, n in enumerate(names) if n == last or n.startswith((f"{last}.", last.replace(".", "_")))]
    if not ends:
        raise UserError(f"frozen_stages {count}: backbone '{name}' has no module '{last}'; --set model.frozen_stages=0")
    for module_name in names[: max(ends) + 1]:
        for parameter in body.get_submodule(module_name).parameters(recurse=False):
            parameter.requires_grad_(False)
