"""Write a traced graph as a file: ONNX, OpenVINO or torch.export."""

from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils._sympy.value_ranges import ValueRanges

from ..runtimes.metadata import NAMESPACE, ExportMetadata
from ..utils.packages import need, quiet_exporter
from .graph import INPUTS

OPSET = 20
_DIMENSIONS = {
    "pred_logits": ("batch", "queries", "classes"),
    "pred_boxes": ("batch", "queries", "box"),
    "boxes": ("batch", "detections", "box"),
    "scores": ("batch", "detections"),
    "labels": ("batch", "detections"),
}


def write_file(to: str, graph: Any, path: Path, metadata: ExportMetadata) -> None:
    """Write a graph and its metadata: a traced program for "torch", else the ONNX model of `convert_to_onnx`."""
    strings = metadata.to_strings()
    if to == "torch":
        # The tracer assumes that no map is 1 pixel wide, but its operators compute such maps too.
        for symbol, limits in graph.range_constraints.items():
            graph.range_constraints[symbol] = ValueRanges(1, limits.upper)
        torch.export.save(graph, path, extra_files={f"{NAMESPACE}.{key}": text for key, text in strings.items()})
        return
    if to == "onnx":
        need("onnx").save(graph, path)
        return
    if to != "openvino":
        raise ValueError(f"unknown export target {to!r}")
    openvino = need("openvino")
    converted = openvino.Core().read_model(graph.SerializeToString())  # `convert_model` would send telemetry
    for key, text in strings.items():
        converted.set_rt_info(text, [NAMESPACE, key])
    # The CPU plugin would choose bf16 if the processor has it, which changes logits by whole units.
    if metadata.precision != "fp16":
        converted.set_rt_info("f32", ["runtime_options", "INFERENCE_PRECISION_HINT"])
    openvino.save_model(converted, path, compress_to_fp16=metadata.precision == "fp16")


def convert_to_onnx(program: ExportedProgram, metadata: ExportMetadata) -> Any:
    """Return a traced program as an ONNX model with metadata and named dimensions."""
    with quiet_exporter():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=INPUTS[: None if metadata.post_processing else 2],
            output_names=metadata.outputs,
            verbose=False,
        )
    assert exported is not None
    proto = exported.model_proto
    # Replace the tracer's symbols for dynamic dimensions by readable names.
    pixel_dims = proto.graph.input[0].type.tensor_type.shape.dim
    names = {dim.dim_param: name for dim, name in zip(pixel_dims, ("batch", "", "height", "width"), strict=True)}
    for value in [*proto.graph.input, *proto.graph.output]:
        dims = value.type.tensor_type.shape.dim
        for dim, own in zip(dims, _DIMENSIONS.get(value.name, [""] * len(dims)), strict=True):
            if dim.dim_param:
                dim.dim_param = own or names.get(dim.dim_param, dim.dim_param)
    # The descriptions of intermediate tensors contain the old symbols, and no runtime needs them.
    del proto.graph.value_info[:]
    for key, text in metadata.to_strings().items():
        proto.metadata_props.add(key=key, value=text)
    return proto
