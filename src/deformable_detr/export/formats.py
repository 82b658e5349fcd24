"""The three kinds of files: how a graph becomes one, and how one runs."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..errors import UserError
from .graph import INPUTS, OUTPUTS

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
OPSET = 20
_DESCRIPTION = "deformable_detr"  # where OpenVINO's IR and .pt2 keep the metadata


class Runtime(Protocol):
    """A file that runs: `strings` is its metadata, `device` where its outputs are; inputs may be anywhere."""

    strings: dict[str, str]
    device: torch.device

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]: ...


def write(
    kind: str,
    program: ExportedProgram,
    path: Path,
    strings: Mapping[str, str],
    precision: str,
    post_processing: bool,
    change: Callable[[Any], Any] = lambda proto: proto,
) -> None:
    """Writes the graph as `kind` (a key of SUFFIXES) with the metadata; OpenVINO has a .bin beside the .xml.

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
    with _quiet():
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


def read(path: Path, device: str = "auto", threads: int | None = None) -> Runtime:
    """The runtime of a file by its suffix. device: auto, cpu, cuda, …; threads: of the CPU, none: the runtime's choice.

    Raises UserError for a file that is missing, broken or of no known kind, and for a device that the runtime lacks.
    """
    kinds: dict[str, type] = {".onnx": OnnxRuntime, ".xml": OpenVinoRuntime, ".pt2": TorchRuntime}
    if path.suffix not in kinds:
        raise UserError(f"{path}: an exported model ends in {', '.join(kinds)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return kinds[path.suffix](path, device, threads)


class OnnxRuntime:
    """ONNX Runtime; on a GPU where its build has it and `device` does not say cpu."""

    def __init__(self, path: Path, device: str, threads: int | None) -> None:
        runtime = need("onnxruntime")
        wanted = _wanted(device, "CUDAExecutionProvider" in runtime.get_available_providers(), "onnxruntime", path)
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        providers: list[Any] = ["CPUExecutionProvider"]
        if wanted.type == "cuda":
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": wanted.index or 0, "use_tf32": 0}))
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # its exceptions have no common base of their own
            raise UserError(f"{path} cannot be opened by onnxruntime: {_line(error)}") from None
        self.path, self.device = path, torch.device("cpu")
        self.strings: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        self.names = [value.name for value in self.session.get_inputs()]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        arrays = {name: value.cpu().numpy() for name, value in zip(self.names, inputs, strict=True)}
        try:
            found = self.session.run(None, arrays)
        except Exception as error:  # as above
            raise UserError(f"{self.path} fails in onnxruntime: {_line(error)}") from None
        return [torch.from_numpy(array) for array in found]


class OpenVinoRuntime:
    """OpenVINO on the CPU with its precision pinned, or on another of its devices by name (GPU, NPU)."""

    def __init__(self, path: Path, device: str, threads: int | None) -> None:
        openvino = need("openvino")
        core = openvino.Core()
        target = "CPU" if device in ("auto", "cpu") else device
        if target.split(".")[0] not in {name.split(".")[0] for name in core.available_devices}:
            raise UserError(f"{path}: OpenVINO has no device '{device}' here, only {', '.join(core.available_devices)}")
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            model = core.read_model(path)
            described = model.get_rt_info([_DESCRIPTION]) if model.has_rt_info([_DESCRIPTION]) else None
            entries = described.value if described is not None else {}
            self.strings = {key: str(getattr(entry, "value", entry)) for key, entry in dict(entries).items()}
            self.compiled = core.compile_model(model, target, options)
        except RuntimeError as error:
            raise UserError(f"{path} cannot be opened by OpenVINO: {_line(error)}") from None
        self.device = torch.device("cpu")

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        found = self.compiled([value.cpu().numpy() for value in inputs])
        return [torch.from_numpy(found[index].copy()) for index in range(len(found))]


class TorchRuntime:
    """PyTorch itself, by `torch.export.load`."""

    def __init__(self, path: Path, device: str, threads: int | None) -> None:
        from torch.export.passes import move_to_device_pass

        self.device = _wanted(device, torch.cuda.is_available(), "PyTorch", path)
        keys = dict.fromkeys((f"{_DESCRIPTION}.{key}" for key in METADATA_KEYS), "")
        try:
            with _quiet():
                program = torch.export.load(path, extra_files=keys)
        except Exception as error:  # whatever the archive's reader raises: it is the file that is wrong
            raise UserError(f"{path} cannot be opened by PyTorch: {_line(error)}") from None
        self.strings = {key.removeprefix(f"{_DESCRIPTION}."): text for key, text in keys.items() if text}
        if self.device.type != "cpu":
            program = move_to_device_pass(program, str(self.device))
        # Its guards repeat what the tracer assumed of layouts; sizes were verified when the file was written.
        self.module = program.module(check_guards=False)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(self.module(*(value.to(self.device) for value in inputs)))


METADATA_KEYS = (
    "format", "version", "model", "class_names", "category_ids", "pixel_mean", "pixel_std", "image_size", "short_side",
    "long_side", "size_multiple", "precision", "sampling", "post_processing",
)  # fmt: skip


def need(package: str) -> Any:
    """The package, or a UserError that says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{package} is not installed: pip install 'deformable-detr[export]'") from None


def _wanted(device: str, has_cuda: bool, runtime: str, path: Path) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: no such device") from None
    if wanted.type not in ("cpu", "cuda") or (wanted.type == "cuda" and not has_cuda):
        raise UserError(f"{path}: {runtime} has no device '{device}' here")
    return wanted


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings and progress lines, which are about its inside."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
