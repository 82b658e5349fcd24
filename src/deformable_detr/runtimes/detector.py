"""An exported file in the model's place: the same config, the same call, the same prediction."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.errors import UserError
from .files import Runtime, read
from .metadata import Described


class ExportedDetector(nn.Module):
    """Predicts and is evaluated as `DeformableDETR` is, by the runtime that its file is for.

    config, pixel_mean, pixel_std: as the model's. described: how it was exported. Its canvas is fixed where
    `described.image_size` is: smaller batches are padded to it.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, runtime: Runtime, where: str) -> None:
        super().__init__()
        self.runtime = runtime
        self.described = Described.from_strings(runtime.strings, where)
        self.config = self.described.config
        device = runtime.device
        self.register_buffer("pixel_mean", torch.tensor(self.config.pixel_mean, device=device), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(self.config.pixel_std, device=device), persistent=False)

    @property
    def canvas(self) -> tuple[int, int] | None:
        """(height, width) that images have to fit in; none: any."""
        return self.described.image_size

    def forward(
        self, pixels: Tensor, padding_mask: Tensor | None = None, *, return_attention: bool = False
    ) -> dict[str, Any]:
        """pred_logits (B, Q, K) and pred_boxes (B, Q, 4), cxcywh in 0..1 of the unpadded image.

        pixels: (B, 3, H, W), normalized RGB. padding_mask: (B, H, W) bool, True = padding; none: no padding.
        Raises UserError for attention, which is not in the file, and for pixels larger than a fixed canvas.
        """
        if return_attention:
            raise UserError("an exported model does not tell where it looked; give the model's folder")
        if padding_mask is None:
            padding_mask = pixels.new_zeros(pixels.shape[0], *pixels.shape[2:], dtype=torch.bool)
        inputs = list(fitted(pixels, padding_mask, self.canvas))
        if self.described.post_processing:
            inputs.append(torch.tensor([inputs[0].shape[2:]] * len(pixels)))
        logits, boxes = self.runtime(inputs)[:2]
        return {"pred_logits": logits, "pred_boxes": boxes}

    def predict(self, source: Any, threshold: float = 0.5, top_k: int = 100, batch_size: int = 1) -> Any:
        """As `DeformableDETR.predict`."""
        from ..predict.predictor import predict

        return predict(self, source, threshold, top_k, batch_size)


def fitted(pixels: Tensor, padding_mask: Tensor, canvas: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Pixels and mask with padding to the right and below up to the canvas, where there is one."""
    if canvas is None or tuple(pixels.shape[2:]) == canvas:
        return pixels, padding_mask
    below, right = canvas[0] - pixels.shape[2], canvas[1] - pixels.shape[3]
    if min(below, right) < 0:
        height, width = pixels.shape[2:]
        raise UserError(f"images of {height}×{width} pixels are over the exported size {canvas[0]}×{canvas[1]}")
    return F.pad(pixels, (0, right, 0, below)), F.pad(padding_mask, (0, right, 0, below), value=True)


def load(path: str | os.PathLike[str], device: str = "auto", threads: int | None = None) -> ExportedDetector:
    """The detector of a file that `export` wrote. See `formats.read` for device, threads and errors."""
    return ExportedDetector(read(Path(path), device, threads), os.fspath(path))
