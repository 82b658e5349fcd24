"""The heads that read the stride-4 map, for inference: packed layers."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model.mask_head import MaskHead, add_positions
from ...model.roi_head import RoIHead
from .onednn import PackedConv2d, fusable_activation
from .transformer import WeightPacking


class FusedMaskHead(nn.Module):
    """`MaskHead` with packed layers, for channels-last maps. The embeddings are fp32: there are few queries."""

    def __init__(self, head: MaskHead, packing: WeightPacking) -> None:
        super().__init__()
        relu = nn.ReLU()
        self.embed = head.embed
        self.memory_proj, self.lateral = packing.linear(head.memory_proj), packing.linear(head.lateral)
        self.norm = head.norm.to(packing.dtype)
        self.depthwise = PackedConv2d(head.depthwise, fusable_activation(relu), packing.dtype, packing.packed)
        self.pointwise = packing.linear(head.pointwise)

    def features(self, stride4: Tensor, memory: Tensor, finest: tuple[int, int], valid_ratios: Tensor) -> Tensor:
        """Return the pixel features (B, D, h, w) in fp32, as `MaskHead.features` does."""
        x = self.memory_proj(memory[:, : finest[0] * finest[1]]).unflatten(1, finest)
        if stride4.shape[2:] != finest:
            x = F.interpolate(x.permute(0, 3, 1, 2), size=stride4.shape[2:], mode="bilinear", align_corners=False)
            x = x.permute(0, 2, 3, 1)
        x = self.lateral(stride4.permute(0, 2, 3, 1).contiguous(), x.contiguous())
        x = self.depthwise(self.norm(x).relu().permute(0, 3, 1, 2))
        return add_positions(self.pointwise(x.permute(0, 2, 3, 1).contiguous()).float(), valid_ratios)


class FusedRoIHead(RoIHead):
    """`RoIHead` with packed layers, for channels-last maps. The map is in half precision, the queries are fp32."""

    def __init__(self, head: RoIHead, packing: WeightPacking) -> None:
        nn.Module.__init__(self)
        self.grid, self.norm = head.grid, head.norm
        self.lateral = packing.linear(head.lateral)
        exact = replace(packing, dtype=torch.float32)
        layers: list[Any] = list(head.mlp.layers)
        self.mlp = nn.Sequential(exact.linear(layers[0], activation=nn.ReLU()), exact.linear(layers[1]))
