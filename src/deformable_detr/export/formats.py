"""Write a traced graph as a file: ONNX, OpenVINO or torch.export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ..runtimes.metadata import NAMESPACE, ExportMetadata
from ..utils.packages import need, quiet_exporter
from .graph import INPUTS, OUTPUTS

OPSET = 20


def write_file(
    to: str,
    program: ExportedProgram,
    path: Path,
    metadata: ExportMetadata,
    transform: Callable[[Any], Any] = lambda proto: proto,
) -> None:
    """Write a graph and its metadata. `transform` changes the ONNX model that becomes the ONNX or OpenVINO file."""
    strings = metadata.to_strings()
    if to == "torch":
        torch.export.save(program, path, extra_files={f"{NAMESPACE}.{key}": text for key, text in strings.items()})
        return
    proto = transform(_onnx_model(program, strings, metadata.post_processing))
    if to == "onnx":
        need("onnx").save(proto, path)
        return
    openvino = need("openvino")
    converted = openvino.Core().read_model(proto.SerializeToString())  # `convert_model` would send telemetry
    for key, text in strings.items():
        converted.set_rt_info(text, [NAMESPACE, key])
    # The CPU plugin would choose bf16 if the processor has it, which changes logits by whole units.
    if metadata.precision != "fp16":
        converted.set_rt_info("f32", ["runtime_options", "INFERENCE_PRECISION_HINT"])
    openvino.save_model(converted, path, compress_to_fp16=metadata.precision == "fp16")


def _onnx_model(program: ExportedProgram, strings: Mapping[str, str], post_processing: bool) -> Any:
    with quiet_exporter():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=INPUTS if post_processing else INPUTS[:2],
            output_names=OUTPUTS if post_processing else OUTPUTS[:2],
            verbose=False,
        )
    assert exported is not None
    proto = exported.model_proto
    _name_dimensions(proto)
    for key, text in strings.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, text
    return proto


def _name_dimensions(proto: Any) -> None:
    """Replace the tracer's symbols for dynamic dimensions by readable names."""
    names: dict[str, str] = {}
    pixel_dims = proto.graph.input[0].type.tensor_type.shape.dim
    for dimension, name in zip(pixel_dims, ("batch", "", "height", "width"), strict=True):
        if name and dimension.dim_param:
            names[dimension.dim_param] = name
    for value in [*proto.graph.input, *proto.graph.output]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in names:
                dimension.dim_param = names[dimension.dim_param]
    # The descriptions of intermediate tensors contain the old symbols, and no runtime needs them.
    del proto.graph.value_info[:]
