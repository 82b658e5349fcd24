"""Static int8 quantization with NNCF, calibrated on images of the train split."""

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
from ..runtimes.detector import pad_to_canvas
from ..runtimes.metadata import ExportMetadata
from ..utils.packages import need
from .graph import INPUTS

MAX_IMAGES = 200  # for calibration
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"  # the exporter's note of the modules that a node belongs to


class CalibrationImages:
    """Pixels (1, 3, H, W) and padding mask (1, H, W) of images evenly spaced over the train split, read when iterated.

    Raises UserError if the dataset has no train split, or other classes than the model.
    """

    def __init__(self, metadata: ExportMetadata, data: str | os.PathLike[str]) -> None:
        from ..data.dataset import open_dataset
        from ..data.transforms import EvalTransform

        config = metadata.config
        self.canvas = metadata.image_size
        transform = EvalTransform(metadata.resize_rule)
        categories = model_categories(config) if config.category_ids else None
        self.dataset = open_dataset(data, DataConfig().train_split, categories=categories, transform=transform)
        self.mean, self.std = torch.tensor(config.pixel_mean), torch.tensor(config.pixel_std)
        self.count = min(MAX_IMAGES, len(self.dataset))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        from ..data.dataloader import collate

        for number in range(self.count):
            batch, _ = collate([self.dataset[number * len(self.dataset) // self.count]])
            batch = batch.normalize(self.mean, self.std)
            yield pad_to_canvas(batch.pixels, batch.padding_mask, self.canvas)


def quantize(proto: Any, images: CalibrationImages, modules: re.Pattern[str], per_channel: bool) -> Any:
    """Return an ONNX model in int8 where a module's name matches (`Detector.int8_modules`), calibrated on the images.

    `per_channel` uses one range per input channel of a depthwise convolution. OpenVINO supports it. ONNX Runtime leaves
    such a convolution in fp32 or, without a bias, fails at the first image.
    """
    nncf = import_nncf()
    ranges = nncf.quantization.advanced_parameters.QuantizationParameters(per_channel=None if per_channel else False)
    ignored = [node.name for node in proto.graph.node if not modules.match(_module_name(node))]
    input_names = [value.name for value in proto.graph.input]

    def graph_inputs(image: tuple[Tensor, Tensor]) -> dict[str, Any]:
        pixels, mask = image
        values = pixels, mask, torch.tensor([pixels.shape[2:]])
        return {name: value.numpy() for name, value in zip(INPUTS, values, strict=True) if name in input_names}

    return nncf.quantize(
        proto,
        nncf.Dataset(images, graph_inputs),
        subset_size=len(images),
        advanced_parameters=nncf.AdvancedQuantizationParameters(activations_quantization_params=ranges),
        ignored_scope=nncf.IgnoredScope(names=ignored, validate=False),  # NNCF merges some nodes before it validates
    )


def _module_name(node: Any) -> str:
    """The innermost module of `InferenceGraph.model` that a node belongs to, or "" if unknown."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES_KEY:
            return ast.literal_eval(entry.value)[-2:][0].removeprefix("model.")  # the last one is the operation
    return ""


def import_nncf() -> Any:
    """Import NNCF without its log messages and telemetry. Raises UserError if it is not installed."""
    with mock.patch.dict(os.environ, {"NNCF_CI": "1"}):
        nncf = need("nncf")
    # `nncf.set_log_level` would also change the level of handlers that it shares with the program.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf
