"""The mask head: an embedding per query and a map of pixel features, whose products are mask logits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.schema import ModelConfig
from ..utils.dtype import upcast
from .layers import MLP

PRIOR_LOGIT = -2.0  # masks start empty: about 12% foreground everywhere


class MaskHead(nn.Module):
    """Mask embeddings and pixel features (Mask DINO, section 3.2) of D = C / 2 channels, at stride 4.

    The pixel map is the sum of the backbone's stride-4 map and the finest level of the memory, both projected to D
    channels, then a depthwise-separable convolution. One head serves all decoder layers.
    """

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        C, D = config.hidden_dim, config.hidden_dim // 2
        self.embed = MLP(C, C, D, layers=3)
        self.lateral = nn.Linear(channels, D)
        self.memory_proj = nn.Linear(C, D)
        self.norm = nn.LayerNorm(D)
        self.depthwise = nn.Conv2d(D, D, 3, padding=1, groups=D)
        self.pointwise = nn.Linear(D, D)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Start with channel 0 as the bias of all masks: 1 in the features, the prior in the embeddings."""
        last = self.embed.layers[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            self.pointwise.weight[0] = 0.0
            self.pointwise.bias[0] = 1.0
            last.weight[0] = 0.0
            last.bias[0] = PRIOR_LOGIT

    def embeddings(self, queries: Tensor) -> Tensor:
        """Return the mask embeddings (…, D) of the normed outputs (…, C) of a decoder layer, in at least fp32."""
        return upcast(self.embed(queries))

    def features(self, stride4: Tensor, memory: Tensor, finest: tuple[int, int]) -> Tensor:
        """Return the pixel features (B, D, h, w) in at least fp32.

        Args:
            stride4: (B, channels, h, w), the backbone's map.
            memory: (B, S, C), the encoder's output.
            finest: (height, width) of the memory's first level.
        """
        x = self.memory_proj(memory[:, : finest[0] * finest[1]]).unflatten(1, finest).permute(0, 3, 1, 2)
        if stride4.shape[2:] != x.shape[2:]:
            x = F.interpolate(x, size=stride4.shape[2:], mode="bilinear", align_corners=False)
        # Channels last from here on: a 1×1 convolution is a linear layer.
        x = self.lateral(stride4.permute(0, 2, 3, 1)) + x.permute(0, 2, 3, 1)
        x = self.depthwise(self.norm(x).relu().permute(0, 3, 1, 2)).relu()
        return upcast(self.pointwise(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
