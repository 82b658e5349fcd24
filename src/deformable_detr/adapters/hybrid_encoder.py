"""The hybrid encoder of RT-DETR and D-FINE with fewer operations: 1×1 convolutions before the upsampling."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedHybridEncoder(nn.Module):
    """The result of transformers' hybrid encoder (Zhao et al. 2024, section 4.2), with the same maps.

    A top-down step starts with 1×1 convolutions of [upsampled map, projected map]. They are linear: the convolution of
    the first map moves before its upsampling, and that of the second is merged with the projection before it.

    Args:
        model: transformers' model, whose batch norms are folded. Its projections that are merged are replaced.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        encoder = model.encoder
        self.attended = encoder.encode_proj_layers if encoder.config.encoder_layers else []
        self.attention, self.lateral = encoder.aifi, encoder.lateral_convs
        self.downsample, self.bottom_up = encoder.downsample_convs, encoder.pan_blocks
        self.top_down = nn.ModuleList()
        for index, block in enumerate(encoder.fpn_blocks):
            level = len(encoder.fpn_blocks) - 1 - index
            projection = None if level in self.attended else model.encoder_input_proj[level][0]
            step = TopDownStep(block, projection)
            if step.merges:
                model.encoder_input_proj[level] = nn.Identity()
            self.top_down.append(step)

    @staticmethod
    def supports(model: Any) -> bool:
        """Return whether the model has such an encoder; DEIMv2's may add maps instead."""
        return hasattr(model, "encoder_input_proj") and hasattr(model.encoder, "fpn_blocks")

    def forward(self, inputs_embeds: list[Tensor], **options: Any) -> Any:
        """Maps of the backbone (B, C_l, H_l, W_l), finest first → `last_hidden_state`, maps of the same sizes."""
        maps = list(inputs_embeds)
        for layer, level in zip(self.attention, self.attended, strict=False):
            maps[level] = layer(maps[level], **options)
        for index, (lateral, step) in enumerate(zip(self.lateral, self.top_down, strict=True)):
            level = len(self.top_down) - index
            maps[level] = lateral(maps[level])
            maps[level - 1] = step(maps[level], maps[level - 1])
        for level, (downsample, block) in enumerate(zip(self.downsample, self.bottom_up, strict=True)):
            maps[level + 1] = block(torch.concat([downsample(maps[level]), maps[level + 1]], dim=1))
        return SimpleNamespace(last_hidden_state=maps, hidden_states=None, attentions=None)


class TopDownStep(nn.Module):
    """block([upsample(top), projection(low)]) of transformers' `fpn_blocks`.

    Attributes:
        merges: Whether `low` is the input of the projection.
    """

    def __init__(self, block: Any, projection: nn.Conv2d | None) -> None:
        super().__init__()
        names = ["conv1", "conv2"] if type(block).__name__.endswith("CSPRepLayer") else ["conv1"]
        self.top, self.low, self.activations = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        layers = [getattr(block, name) for name in names]
        self.merges = projection is not None and _is_cheaper(projection, [layer.conv for layer in layers])
        for index, (name, layer) in enumerate(zip(names, layers, strict=True)):
            weight, bias = layer.conv.weight, layer.conv.bias
            of_top, of_low = weight.chunk(2, dim=1)
            if self.merges and projection is not None:
                bias = bias + of_low[:, :, 0, 0] @ projection.bias
                of_low = (of_low[:, :, 0, 0] @ projection.weight[:, :, 0, 0])[:, :, None, None]
            self.top.append(_convolution(of_top, None))
            self.low.append(_convolution(of_low, bias))
            self.activations.append(layer.activation)
            setattr(block, name, _Item(index))
        self.block = block

    def forward(self, top: Tensor, low: Tensor) -> Tensor:
        """(B, C, H, W), (B, C_low, 2H, 2W) → (B, C, 2H, 2W)."""
        maps = []
        for of_top, of_low, activation in zip(self.top, self.low, self.activations, strict=True):
            upsampled = F.interpolate(of_top(top), scale_factor=2.0, mode="nearest")
            maps.append(activation(upsampled.add_(of_low(low))))
        return self.block(maps)


class _Item(nn.Module):
    """One of the inputs of a block, in place of a layer that has run."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, maps: list[Tensor]) -> Tensor:
        return maps[self.index]


def _convolution(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None)
    convolution.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        convolution.bias = nn.Parameter(bias, requires_grad=False)
    return convolution


def _is_cheaper(projection: nn.Conv2d, convolutions: list[nn.Conv2d]) -> bool:
    """Return whether merged weights have fewer elements than the projection and what reads its result."""
    C_in, C = projection.in_channels, projection.out_channels
    outputs = sum(convolution.out_channels for convolution in convolutions)
    return C_in * outputs <= C_in * C + C * outputs
