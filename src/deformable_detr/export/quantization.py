"""Static int8: weights and activations of the parts that bear it, calibrated on images of the training split."""

from __future__ import annotations

import ast
import logging
import os
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..config.schema import DataConfig
from ..predict.predictor import model_categories
from ..runtimes.detector import fitted
from ..runtimes.metadata import Described
from ..utils.packages import need
from .graph import INPUTS

IMAGES = 200  # of the training split, at most
# Modules whose convolutions and products are in int8, the fastest choice first. All else stays in fp32: the backbone's
# stem and first stage (by timm's names), for they alone cost a trained model 0.013 AP; what places and scores boxes
# (heads, sampling offsets, attention weights, reference points); normalization, softmax and the sampling itself; and
# the decoder, whose few queries take little time.
_FIRST = r"body\.(conv_stem|conv1|stem|blocks\.0|layer1|stages\.0|stages_0)\b"
_ENCODER = r"model\.encoder\.layers\.\d+\.(ffn|self_attn\.(value_proj|output_proj))\b"
PARTS = {
    "backbone and encoder": re.compile(rf"model\.(backbone\.(?!{_FIRST})|projections\b)|{_ENCODER}"),
    "encoder": re.compile(_ENCODER),
}
_SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter says which modules a node is of


class Calibration:
    """Inputs of the graph, one image each, from all over the training split; read anew each time they are asked for.

    Iteration gives (pixels (1, 3, H, W) normalized, padding mask (1, H, W)), resized as in evaluation.
    Raises UserError for a set without that split, and for one whose classes are not the model's.
    """

    def __init__(self, described: Described, data: str | os.PathLike[str], most: int = IMAGES) -> None:
        from ..data.dataset import open_dataset
        from ..data.transforms import EvalTransform

        config = described.config
        self.canvas = described.image_size
        transform = EvalTransform(config.image_size, config.long_side, self.canvas, config.size_divisor)
        categories = model_categories(config) if config.category_ids else None
        self.dataset = open_dataset(data, DataConfig().train_split, categories=categories, transform=transform)
        self.mean, self.std = torch.tensor(config.pixel_mean), torch.tensor(config.pixel_std)
        self.count = min(most, len(self.dataset))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        from ..data.dataloader import collate

        for number in range(self.count):
            batch, _ = collate([self.dataset[number * len(self.dataset) // self.count]])
            batch = batch.normalize(self.mean, self.std)
            yield fitted(batch.pixels, batch.padding_mask, self.canvas)


def quantized(proto: Any, images: Calibration, parts: re.Pattern[str], by_channel: bool) -> Any:
    """An ONNX model with the modules of `parts` in int8, their ranges those that the images cause.

    by_channel: the inputs of depthwise convolutions have a range each channel. OpenVINO computes with them; ONNX
        Runtime leaves such a convolution in fp32, or without a bias opens the file and fails at the first image.
    """
    nncf = quantizer()
    ranges = nncf.quantization.advanced_parameters.QuantizationParameters(per_channel=None if by_channel else False)
    kept = [node.name for node in proto.graph.node if not parts.match(_module(node))]
    names = [value.name for value in proto.graph.input]

    def inputs(image: tuple[Tensor, Tensor]) -> dict[str, Any]:
        pixels, mask = image
        values = pixels, mask, torch.tensor([pixels.shape[2:]])
        return {name: value.numpy() for name, value in zip(INPUTS, values, strict=True) if name in names}

    return nncf.quantize(
        proto,
        nncf.Dataset(images, inputs),
        subset_size=len(images),
        advanced_parameters=nncf.AdvancedQuantizationParameters(activations_quantization_params=ranges),
        ignored_scope=nncf.IgnoredScope(names=kept, validate=False),  # it merges some nodes before it looks
    )


def _module(node: Any) -> str:
    """The innermost module that a node of the graph is of, "" where that is not known."""
    for note in node.metadata_props:
        if note.key == _SCOPES:
            return ast.literal_eval(note.value)[-2:][0]  # the last is the operation
    return ""


def quantizer() -> Any:
    """NNCF without its chatter, and without the report on each use that it sends. UserError where it is missing."""
    with mock.patch.dict(os.environ, {"NNCF_CI": "1"}):
        nncf = need("nncf")
    # Its own call would also set the level of its handlers, which the program may use for other things too.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf
