"""Position encodings of feature maps and of boxes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sine_encoding(values: Tensor, channels: int, temperature: float = 10000) -> Tensor:
    """Encode positions in 0..1 as interleaved sines and cosines of `channels` / 2 wavelengths: (…, channels).

    temperature: About the ratio of the longest wavelength to the shortest.
    """
    index = torch.arange(channels, dtype=values.dtype, device=values.device)
    wavelengths = temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / channels)
    phases = values[..., None] * (2 * math.pi) / wavelengths
    return torch.stack((phases[..., 0::2].sin(), phases[..., 1::2].cos()), dim=-1).flatten(-2)


def box_encoding(boxes: Tensor, channels: int) -> Tensor:
    """Encode each coordinate of boxes (…, 4) in 0..1: (…, 4 · channels) (appendix A.4, two-stage)."""
    return sine_encoding(boxes, channels).flatten(-2)


class PositionEmbeddingSine(nn.Module):
    """Sine encoding of each pixel's center, relative to the unpadded part of the map.

    offset: Position inside a pixel: 0.5 is its center (paper), 1 its far edge (DINO).
    """

    def __init__(self, dim: int, temperature: float = 10000, offset: float = 0.5) -> None:
        super().__init__()
        self.dim, self.temperature, self.offset = dim, temperature, offset

    def forward(self, padding_mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (B, C, H, W) for a mask (B, H, W)."""
        valid = (~padding_mask).to(torch.promote_types(dtype, torch.float32))
        y, x = valid.cumsum(1), valid.cumsum(2)
        y = (y - (1 - self.offset)) / (y[:, -1:, :] + 1e-6)
        x = (x - (1 - self.offset)) / (x[:, :, -1:] + 1e-6)
        return torch.cat((self._encode(y), self._encode(x)), dim=-1).permute(0, 3, 1, 2).to(dtype)

    def axis_encodings(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return, for an unpadded map and in channel order, rows (H, 1, C / 2) and columns (1, W, C / 2)."""
        y, x = ((torch.arange(length) + self.offset) / (length + 1e-6) for length in (height, width))
        return self._encode(y)[:, None], self._encode(x)[None]

    def _encode(self, values: Tensor) -> Tensor:
        return sine_encoding(values, self.dim // 2, self.temperature)


class PositionEmbeddingLearned(nn.Module):
    """A learned vector per column and per row; beyond `size` × `size` pixels the table is interpolated."""

    def __init__(self, dim: int, size: int = 50) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.rand(size, dim // 2))
        self.columns = nn.Parameter(torch.rand(size, dim // 2))

    def forward(self, padding_mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (B, C, H, W) for a mask (B, H, W)."""
        B, H, W = padding_mask.shape
        columns, rows = self.axis_encodings(H, W)
        encoding = torch.cat((columns.expand(H, -1, -1), rows.expand(-1, W, -1)), dim=-1)
        return encoding.permute(2, 0, 1).expand(B, -1, -1, -1).to(dtype)

    def axis_encodings(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return, in channel order (not the sine encoding's), columns (1, W, C / 2) and rows (H, 1, C / 2)."""
        return _resize_table(self.columns, width)[None], _resize_table(self.rows, height)[:, None]


def _resize_table(table: Tensor, length: int) -> Tensor:
    if torch.compiler.is_exporting():  # without a branch on the length, which an exported graph leaves open
        last = len(table) - 1
        steps = torch.scalar_tensor(length, dtype=table.dtype, device=table.device) - 1
        index = torch.arange(length, dtype=table.dtype, device=table.device) * (last / steps.clamp(min=last))
        low = index.long().clamp(max=last)
        fraction = (index - low)[:, None]
        return table[low] * (1 - fraction) + table[(low + 1).clamp(max=last)] * fraction
    if length <= len(table):
        return table[:length]
    return F.interpolate(table.t()[None], size=length, mode="linear", align_corners=True)[0].t()
