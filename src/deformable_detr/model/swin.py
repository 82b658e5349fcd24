"""Swin Transformers of timm as backbones of detectors, for images of any size (Liu et al. 2021, arXiv 2103.14030)."""

from typing import Any

import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

# Windows keep their size on small maps, attention masks follow the image, stochastic depth is that of detectors.
OPTIONS = {"always_partition": True, "strict_img_size": False, "drop_path_rate": 0.2}


class _PaddedBlock(SwinTransformerBlock):
    """timm's block, but padded to whole windows before the shift, as detectors are trained: timm pads after it."""

    def _attn(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        height, width = self.window_size
        x = F.pad(x, (0, 0, 0, -W % width, 0, -H % height))
        return super()._attn(x)[:, :H, :W]


class SwinFeatures(nn.Module):
    """The stages of timm's feature extractor: outputs (B, C, H, W), the coarsest `levels` of them with a LayerNorm.

    Images are padded to whole patches.
    """

    patch_embed: Any

    def __init__(self, body: Any, levels: int) -> None:
        super().__init__()
        self.feature_info = body.feature_info
        for name, module in body.items():
            self.add_module(name, module)
        for module in self.modules():
            if type(module) is SwinTransformerBlock:
                module.__class__ = _PaddedBlock
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.feature_info.channels()[-levels:])

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the maps (B, C, H, W) of pixels (B, 3, H, W), finest first."""
        height, width = pixels.shape[2:]
        x = self.patch_embed(F.pad(pixels, (0, -width % 4, 0, -height % 4)))
        outputs = self.feature_info.module_name()
        norms = dict(zip(outputs[-len(self.norms) :], self.norms, strict=True))
        maps = []
        for name, stage in self.named_children():
            if name.startswith("layers_"):
                x = stage(x)
                if (output := name.replace("_", ".")) in outputs:
                    maps.append((norms[output](x) if output in norms else x).permute(0, 3, 1, 2))
        return maps
