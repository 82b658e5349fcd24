"""From a model to a graph: `torch.export` with batch, height and width left open."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.export import Dim, ExportedProgram

from ..detector import DeformableDETR
from ..model.postprocess import clip_boxes_to_image, topk_boxes
from ..ops import use_backend
from ..runtimes.fused.folding import stripped
from ..utils.errors import UserError, first_line
from .padding import open_same_padding

Sampling = Literal["grid_sample", "gather"]
INPUTS = ("pixels", "padding_mask", "original_sizes")
OUTPUTS = ("pred_logits", "pred_boxes", "boxes", "scores", "labels")
TOP_K = 100  # detections an image with post-processing
EXAMPLE = (3, 203, 267)  # batch, height and width that no other dimension shares


def parse_size(text: str) -> tuple[int, int] | None:
    """(height, width) of "H,W", or none of "dynamic". Raises UserError for anything else."""
    if text == "dynamic":
        return None
    sides = text.split(",")
    if len(sides) == 2 and all(side.strip().isdecimal() and int(side) > 0 for side in sides):
        return int(sides[0]), int(sides[1])
    raise UserError(f"--image-size {text}: give H,W in pixels, such as 640,640, or dynamic")


class InferenceGraph(nn.Module):
    """What an exported file computes.

    forward(pixels (B, 3, H, W) normalized fp32, padding_mask (B, H, W) bool) → pred_logits (B, Q, K), pred_boxes
    (B, Q, 4), as the model's; with post_processing also original_sizes (B, 2) int64 (height, width) in, and boxes
    (B, k, 4) xyxy pixels inside the original images, scores (B, k) and labels (B, k) int64 out, best first, k = 100 or
    all.
    """

    def __init__(self, model: DeformableDETR, post_processing: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = _prepared(model).to(dtype)
        self.post_processing, self.dtype = post_processing, dtype

    def forward(self, pixels: Tensor, padding_mask: Tensor, original_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        out = self.model(pixels.to(self.dtype), padding_mask)
        logits, boxes = out["pred_logits"].float(), out["pred_boxes"].float()
        if original_sizes is None:
            return logits, boxes
        corners, scores, labels = topk_boxes(logits, boxes, original_sizes.float(), TOP_K)
        return logits, boxes, clip_boxes_to_image(corners, original_sizes), scores, labels


def _prepared(model: DeformableDETR) -> DeformableDETR:
    """A copy on the CPU, without what only training needs."""
    model = stripped(model, "cpu")
    model.to(memory_format=torch.contiguous_format)
    open_same_padding(model.backbone.body)
    return model


def trace(graph: InferenceGraph, image_size: tuple[int, int] | None, sampling: Sampling) -> ExportedProgram:
    """The graph of any batch, and of any height and width or of those given.

    Raises UserError for a model that cannot be traced, which are backbones that compute with their input's size.
    """
    batch, height, width = EXAMPLE
    height, width = image_size or (height, width)
    pixels, mask = torch.zeros(batch, 3, height, width), torch.zeros(batch, height, width, dtype=torch.bool)
    mask[1, height // 2 :] = True
    sides = [Dim.DYNAMIC if image_size is None else Dim.STATIC] * 2
    inputs = (pixels, mask)
    shapes = ({0: Dim.DYNAMIC, 2: sides[0], 3: sides[1]}, {0: Dim.DYNAMIC, 1: sides[0], 2: sides[1]})
    if graph.post_processing:
        inputs += (torch.tensor([[height, width]] * batch),)
        shapes += ({0: Dim.DYNAMIC},)
    plain = "gather" if sampling == "gather" else "reference"
    try:
        with use_backend(plain), _tracing(), torch.no_grad():
            return torch.export.export(graph, inputs, dynamic_shapes=shapes, strict=False)
    except (RuntimeError, ValueError, TypeError, TorchDynamoException) as error:
        line = first_line(error, 300)
        raise UserError(
            f"a model with backbone '{graph.model.config.backbone}' cannot be exported"
            f"{' with open sizes; try --image-size H,W' if image_size is None else ''}: {line}"
        ) from error


@contextmanager
def _tracing() -> Iterator[None]:
    """Attention by plain operators instead of the fused one for inference, and no chatter of the exporter."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    level = logging.getLogger("torch.export").level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        logging.getLogger("torch.export").setLevel(level)
