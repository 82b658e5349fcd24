"""An exported file as a detector, with the config and the calls of `DeformableDETR`."""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.image_size import ResizeRule
from ..model.mask_ops import content_ratios
from ..predict.predictor import Detector
from ..utils.errors import UserError
from .files import RUNTIMES, Runtime
from .metadata import ExportMetadata, output_names


class ExportedDetector(Detector):
    """An exported file that takes the model's place in `predict` and `evaluate`; `path` is for error messages."""

    def __init__(self, runtime: Runtime, path: str) -> None:
        super().__init__()
        self.runtime = runtime
        self.metadata = ExportMetadata.from_strings(runtime.strings, path)
        self.config = self.metadata.config
        self.canvas = self.metadata.image_size  # (height, width) to which all batches are padded. None: any size
        device = runtime.device
        self.register_buffer("pixel_mean", torch.tensor(self.config.pixel_mean, device=device), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(self.config.pixel_std, device=device), persistent=False)

    def forward(self, pixels: Tensor, padding_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return the outputs of the model: `pred_logits`, `pred_boxes` and those of masks with their "content_ratios".

        Raises UserError if the pixels exceed the exported size.
        """
        if padding_mask is None:
            padding_mask = torch.zeros_like(pixels[:, 0], dtype=torch.bool)
        inputs = list(pad_to_canvas(pixels, padding_mask, self.canvas))
        if self.metadata.post_processing:
            inputs.append(torch.tensor([inputs[0].shape[2:]] * len(pixels)))
        outputs = dict(zip(output_names(self.config, False), self.runtime(inputs), strict=False))
        return {**outputs, "content_ratios": content_ratios(inputs[1])} if self.config.masks else outputs

    @property
    def resize_rule(self) -> ResizeRule:
        """The size that an image is resized to, at most the exported size."""
        return self.metadata.resize_rule


def pad_to_canvas(pixels: Tensor, padding_mask: Tensor, canvas: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Pad pixels and mask on the right and at the bottom to `canvas` (height, width). None: return them unchanged."""
    if canvas is None or tuple(pixels.shape[2:]) == canvas:
        return pixels, padding_mask
    bottom, right = canvas[0] - pixels.shape[2], canvas[1] - pixels.shape[3]
    if min(bottom, right) < 0:
        height, width = pixels.shape[2:]
        raise UserError(f"images of {height}×{width} pixels exceed the exported size {canvas[0]}×{canvas[1]}")
    return F.pad(pixels, (0, right, 0, bottom)), F.pad(padding_mask, (0, right, 0, bottom), value=True)


def load_exported(path: str | os.PathLike[str], device: str = "auto", threads: int | None = None) -> ExportedDetector:
    """Load a file that `export` wrote, in the runtime that its suffix names.

    Args:
        path: A .onnx, .xml (OpenVINO) or .pt2 file.
        device: "auto", "cpu", "cuda", or a device of OpenVINO.
        threads: CPU threads. Default: the runtime's own choice.

    Raises:
        UserError: The file is missing, damaged or of another kind, or the runtime does not have the device.
    """
    path = Path(path)
    if path.suffix not in RUNTIMES:
        raise UserError(f"{path} is not an exported model: its name must end in {', '.join(RUNTIMES)}")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    for file in (path, path.with_suffix(".bin")):
        if file.exists() and not file.is_file():  # a pipe would block the runtime
            raise UserError(f"{file} cannot be read: not a regular file")
    return ExportedDetector(RUNTIMES[path.suffix](path, device, threads), str(path))
