"""The three kinds of files: how a graph becomes one, and how one runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ..runtimes.metadata import _DESCRIPTION
from ..utils.packages import need, quiet_exporter
from .graph import INPUTS, OUTPUTS

OPSET = 20


def write(
    kind: str,
    program: ExportedProgram,
    path: Path,
    strings: Mapping[str, str],
    precision: str,
    post_processing: bool,
    change: Callable[[Any], Any] = lambda proto: proto,
) -> None:
    """Writes the graph as `kind` (a key of EXPORT_SUFFIXES) with the metadata; OpenVINO has a .bin beside the .xml.

    change: what is done to the ONNX model on the way to either ONNX or OpenVINO.
    """
    if kind == "torch":
        torch.export.save(program, path, extra_files={f"{_DESCRIPTION}.{key}": text for key, text in strings.items()})
        return
    proto = change(_onnx(program, strings, post_processing))
    if kind == "onnx":
        need("onnx").save(proto, path)
        return
    openvino = need("openvino")
    converted = openvino.Core().read_model(proto.SerializeToString())  # `convert_model` reports each use to its makers
    for key, text in strings.items():
        converted.set_rt_info(text, [_DESCRIPTION, key])
    # The CPU plugin would choose bf16 where the processor has it, which is off by whole units of a logit.
    if precision != "fp16":
        converted.set_rt_info("f32", ["runtime_options", "INFERENCE_PRECISION_HINT"])
    openvino.save_model(converted, path, compress_to_fp16=precision == "fp16")


def _onnx(program: ExportedProgram, strings: Mapping[str, str], post_processing: bool) -> Any:
    """The ONNX model of a graph, in one piece."""
    need("onnx")
    need("onnxscript")
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
    """Readable names of the open dimensions instead of the tracer's symbols."""
    names: dict[str, str] = {}
    for dimension, name in zip(
        proto.graph.input[0].type.tensor_type.shape.dim, ("batch", "", "height", "width"), strict=True
    ):
        if name and dimension.dim_param:
            names[dimension.dim_param] = name
    for value in [*proto.graph.input, *proto.graph.output]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in names:
                dimension.dim_param = names[dimension.dim_param]
    # What is said of the tensors in between has the old names in it, and no runtime needs it.
    del proto.graph.value_info[:]
