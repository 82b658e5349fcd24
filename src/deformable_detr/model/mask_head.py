"""The mask head: an embedding per query and a map of pixel features, whose products are mask logits.

The logit of a pixel at (x, y) for a query with box (cx, cy, w, h) is

    content(query) · content(pixel) + s · (c − (x − cx)² / (w / 2)² − (y − cy)² / (h / 2)²)

with s and c from the query. The second term prefers an ellipse at the box, so that the content need not tell where an
object is. It is a product too: its factors are polynomials of the pixel's position.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.schema import ModelConfig
from ..utils.dtype import upcast
from .layers import MLP

PRIOR_SCALE, PRIOR_OFFSET = 1.0, 1.2  # initial s and c: the ellipse covers nearly the box
_INVERSE_SOFTPLUS = math.log(math.expm1(PRIOR_SCALE))
MIN_SIDE = 0.005  # of a box in the ellipse, relative to the image: larger factors would lose precision


class MaskHead(nn.Module):
    """Mask embeddings and pixel features (Mask DINO, section 3.2) of D = C / 2 + 5 channels, at stride 4.

    The pixels' content is the sum of the backbone's stride-4 map and the finest level of the memory, both projected to
    C / 2 channels, then a depthwise-separable convolution. One head serves all decoder layers.
    """

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        C, D = config.hidden_dim, config.hidden_dim // 2
        self.embed = MLP(C, C, D + 2, layers=3)
        self.lateral = nn.Linear(channels, D)
        self.memory_proj = nn.Linear(C, D)
        self.norm = nn.LayerNorm(D)
        self.depthwise = nn.Conv2d(D, D, 3, padding=1, groups=D)
        self.pointwise = nn.Linear(D, D)
        last = self.embed.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)  # masks start as ellipses
        nn.init.zeros_(last.bias)

    def embeddings(self, queries: Tensor, boxes: Tensor) -> Tensor:
        """Return the mask embeddings (…, D) in at least fp32.

        queries: (…, C), the normed output of a decoder layer. boxes: (…, 4), its boxes, which get no gradient.
        """
        return mask_embeddings(self.embed(queries), boxes)

    def features(self, stride4: Tensor, memory: Tensor, finest: tuple[int, int], valid_ratios: Tensor) -> Tensor:
        """Return the pixel features (B, D, h, w) in at least fp32.

        Args:
            stride4: (B, channels, h, w), the backbone's map.
            memory: (B, S, C), the encoder's output.
            finest: (height, width) of the memory's first level.
            valid_ratios: (B, 2), its unpadded part (width, height).
        """
        x = self.memory_proj(memory[:, : finest[0] * finest[1]]).unflatten(1, finest).permute(0, 3, 1, 2)
        if stride4.shape[2:] != x.shape[2:]:
            x = F.interpolate(x, size=stride4.shape[2:], mode="bilinear", align_corners=False)
        # Channels last from here on: a 1×1 convolution is a linear layer.
        x = self.lateral(stride4.permute(0, 2, 3, 1)) + x.permute(0, 2, 3, 1)
        x = self.depthwise(self.norm(x).relu().permute(0, 3, 1, 2)).relu()
        return add_positions(upcast(self.pointwise(x.permute(0, 2, 3, 1))), valid_ratios)


def mask_embeddings(x: Tensor, boxes: Tensor) -> Tensor:
    """Return the embeddings (…, d + 5) of the last layer's output (…, d + 2): content, and the factors of the ellipse.

    boxes: (…, 4) (cx, cy, w, h) in 0..1 of the image.
    """
    x, boxes = upcast(x), upcast(boxes.detach())
    content, scale, offset = x[..., :-2], F.softplus(x[..., -2:-1] + _INVERSE_SOFTPLUS), x[..., -1:] + PRIOR_OFFSET
    center, half = boxes[..., :2] - 0.5, boxes[..., 2:].clamp(min=MIN_SIDE) / 2
    square = scale / half**2
    constant = scale * offset - (square * center**2).sum(-1, keepdim=True)
    return torch.cat([content, constant, 2 * square * center, -square], dim=-1)


def add_positions(content: Tensor, valid_ratios: Tensor) -> Tensor:
    """Return the features (B, d + 5, h, w) of content (B, h, w, d): with 1, x, y, x² and y² of each pixel.

    x and y are −0.5..0.5 in the image. valid_ratios: (B or 1, 2), the part (width, height) of the map that it covers.
    """
    B, h, w, _ = content.shape
    ratios = valid_ratios.to(content.dtype).expand(B, -1)
    x = (torch.arange(w, device=content.device, dtype=content.dtype) + 0.5) / w / ratios[:, :1] - 0.5
    y = (torch.arange(h, device=content.device, dtype=content.dtype) + 0.5) / h / ratios[:, 1:] - 0.5
    grid = torch.stack([x[:, None].expand(-1, h, -1), y[:, :, None].expand(-1, -1, w)], dim=-1)
    features = torch.cat([content, torch.ones_like(grid[..., :1]), grid, grid**2], dim=-1)
    return features.permute(0, 3, 1, 2)
