"""Trace a model with `torch.export`, with dynamic batch, height and width."""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.export import Dim, ExportedProgram

from ..model.mask_ops import select_masks
from ..model.postprocess import clip_boxes_to_image, topk_boxes
from ..ops import use_backend
from ..predict.predictor import Detector
from ..runtimes.metadata import output_names
from ..utils.errors import UserError, first_line
from ..utils.packages import quiet_exporter

Sampling = Literal["grid_sample", "gather"]
INPUTS = ("pixels", "padding_mask", "original_sizes")
TOP_K = 100  # detections per image with post-processing
EXAMPLE = (3, 203, 267)  # batch, height and width; no other dimension has these sizes


def parse_size(text: str) -> tuple[int, int] | None:
    """Parse "H,W" to (height, width) and "dynamic" to None. Raises UserError for anything else."""
    if text == "dynamic":
        return None
    sides = text.split(",")
    if len(sides) == 2 and all(side.strip().isdecimal() and int(side) > 0 for side in sides):
        return int(sides[0]), int(sides[1])
    raise UserError(f"--image-size {text}: must be H,W in pixels, such as 640,640, or dynamic")


class InferenceGraph(nn.Module):
    """The computation of an exported file, with a copy of the model in `dtype`. Inputs and outputs are fp32."""

    def __init__(self, model: Detector, post_processing: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        module = model.export_module().to(memory_format=torch.contiguous_format)
        for name, layer in list(module.named_modules()):
            if type(layer).__name__ == "Conv2dSame":  # timm's code computes with the input size
                module.set_submodule(name, DynamicSameConv2d(cast(nn.Conv2d, layer)))
        self.model = module.to(dtype)
        self.post_processing, self.dtype = post_processing, dtype
        self.nms_iou = model.config.nms_iou
        self.outputs = output_names(model.config, post_processing)

    def forward(self, pixels: Tensor, padding_mask: Tensor, original_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Compute `outputs`.

        Args:
            pixels: (B, 3, H, W), normalized RGB.
            padding_mask: (B, H, W) bool, True = padding.
            original_sizes: (B, 2) int64, (height, width) in pixels, with post-processing only.

        Returns:
            pred_logits (B, Q, K) and pred_boxes (B, Q, 4) as the model returns them, with masks also its outputs for
            them. With post-processing also boxes (B, k, 4), xyxy in pixels clipped to the original images, scores
            (B, k; 0: removed by NMS) and labels (B, k) int64, in descending order of score, and mask logits
            (B, k, h, w) on the canvas; k is `TOP_K` or Q·K if that is less.
        """
        out = self.model(pixels.to(self.dtype), padding_mask)
        outputs = {name: out[name].float() for name in self.outputs if name in out}
        if original_sizes is not None:
            logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
            corners, scores, labels, queries = topk_boxes(logits, boxes, original_sizes.float(), TOP_K, self.nms_iou)
            clipped = clip_boxes_to_image(corners, original_sizes)
            outputs |= {"boxes": clipped, "scores": scores.clamp(min=0), "labels": labels}
            if "masks" in self.outputs:
                outputs["masks"] = select_masks(outputs, queries)
        return tuple(outputs[name] for name in self.outputs)


class DynamicSameConv2d(nn.Module):
    """A convolution with TensorFlow's "same" padding, ceil(size / stride) output pixels, for dynamic sizes."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.stride, self.dilation, self.groups = convolution.stride, convolution.dilation, convolution.groups

    def forward(self, x: Tensor) -> Tensor:
        padding: list[Any] = []  # numbers, symbolic while tracing
        for dim in (3, 2):  # F.pad starts with the last dimension
            size, stride = x.shape[dim], self.stride[dim - 2]
            extent = self.dilation[dim - 2] * (self.weight.shape[dim] - 1) + 1
            # This form nests to (size - 1) // 4 + 1 and so on. With (size + 1) // 2 the expressions of the exporter
            # grow to half a page per tensor, and a .pt2 file takes minutes to load.
            total = (size - 1) // stride * stride + extent - size
            if extent < stride:
                total = torch.sym_max(total, 0)
            padding += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, padding), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def trace(graph: InferenceGraph, image_size: tuple[int, int] | None, sampling: Sampling) -> ExportedProgram:
    """Trace a graph with a dynamic batch size and a fixed or dynamic (None) image size.

    Raises UserError if the model cannot be traced, such as a backbone whose code computes with the input size.
    """
    batch, (height, width) = EXAMPLE[0], image_size or EXAMPLE[1:]
    pixels, mask = torch.zeros(batch, 3, height, width), torch.zeros(batch, height, width, dtype=torch.bool)
    mask[1, height // 2 :] = True
    side = Dim.DYNAMIC if image_size is None else Dim.STATIC
    inputs = (pixels, mask, torch.tensor([[height, width]] * batch))
    shapes = ({0: Dim.DYNAMIC, 2: side, 3: side}, {0: Dim.DYNAMIC, 1: side, 2: side}, {0: Dim.DYNAMIC})
    count = 3 if graph.post_processing else 2
    backend = "gather" if sampling == "gather" else "reference"
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # trace self-attention as plain operators
    try:
        with use_backend(backend), quiet_exporter(), torch.no_grad():
            return torch.export.export(graph, inputs[:count], dynamic_shapes=shapes[:count], strict=False)
    except (RuntimeError, ValueError, TypeError, TorchDynamoException) as error:
        hint = " with dynamic sizes; try --image-size H,W" if image_size is None else ""
        raise UserError(f"the model cannot be exported{hint}: {first_line(error, 300)}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
