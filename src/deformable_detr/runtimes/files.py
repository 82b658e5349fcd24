"""Runtimes of exported files: ONNX Runtime, OpenVINO and PyTorch.

Each has the file's metadata in `strings`, and the `device` of its outputs. Inputs may be on any device.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.errors import UserError, first_line
from ..utils.packages import need, quiet_exporter
from .metadata import NAMESPACE, REQUIRED_KEYS


class OnnxRuntime:
    """ONNX Runtime, on the GPU if its build supports CUDA and `device` is not "cpu"."""

    def __init__(self, path: Path, device: str, threads: int | None) -> None:
        onnxruntime = need("onnxruntime")
        has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        target = _torch_device(device, has_cuda, "onnxruntime", path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        providers: list[Any] = ["CPUExecutionProvider"]
        if target.type == "cuda":
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": target.index or 0, "use_tf32": 0}))
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise UserError(f"{path} cannot be opened by onnxruntime: {first_line(error)}") from None
        self.path, self.device = path, torch.device("cpu")
        self.strings: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        self.input_names = [value.name for value in self.session.get_inputs()]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        arrays = {name: value.cpu().numpy() for name, value in zip(self.input_names, inputs, strict=True)}
        try:
            outputs = self.session.run(None, arrays)
        except Exception as error:  # see above
            raise UserError(f"{self.path} fails in onnxruntime: {first_line(error)}") from None
        return [torch.from_numpy(array) for array in outputs]


class OpenVinoRuntime:
    """OpenVINO in fp32 on the CPU, or on another of its devices by name (GPU, NPU)."""

    def __init__(self, path: Path, device: str, threads: int | None) -> None:
        core = need("openvino").Core()
        target = "CPU" if device in ("auto", "cpu") else device
        if target.split(".")[0] not in {name.split(".")[0] for name in core.available_devices}:
            names = ", ".join(core.available_devices)
            raise UserError(f"{path}: OpenVINO has no device '{device}' on this machine; choose from {names}")
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            model = core.read_model(path)
            entries = model.get_rt_info([NAMESPACE]).value if model.has_rt_info([NAMESPACE]) else {}
            self.strings = {key: str(getattr(entry, "value", entry)) for key, entry in dict(entries).items()}
            self.compiled = core.compile_model(model, target, options)
        except RuntimeError as error:
            raise UserError(f"{path} cannot be opened by OpenVINO: {first_line(error)}") from None
        self.device = torch.device("cpu")

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        outputs = self.compiled([value.cpu().numpy() for value in inputs])
        return [torch.from_numpy(outputs[index].copy()) for index in range(len(outputs))]


class TorchRuntime:
    """PyTorch, through `torch.export.load`."""

    def __init__(self, path: Path, device: str, threads: int | None) -> None:
        from torch.export.passes import move_to_device_pass

        self.path, self.device = path, _torch_device(device, torch.cuda.is_available(), "PyTorch", path)
        extra_files = {f"{NAMESPACE}.{key}": "" for key in REQUIRED_KEYS}
        try:
            with quiet_exporter():
                program = torch.export.load(path, extra_files=extra_files)
        except Exception as error:  # a damaged archive raises many types
            raise UserError(f"{path} cannot be opened by PyTorch: {first_line(error)}") from None
        self.strings = {key.removeprefix(f"{NAMESPACE}."): text for key, text in extra_files.items() if text}
        if self.device.type != "cpu":
            program = move_to_device_pass(program, str(self.device))
        # The guards repeat the tracer's assumptions on memory layouts; `export.verify` has checked other sizes.
        self.module = program.module(check_guards=False)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        try:
            with torch.no_grad():
                return list(self.module(*(value.to(self.device) for value in inputs)))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # such as a size that the tracer excluded
            raise UserError(f"{self.path} fails in PyTorch: {first_line(error)}") from None


def _torch_device(name: str, has_cuda: bool, runtime: str, path: Path) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    if name != "cpu" and not (has_cuda and name.split(":")[0] == "cuda"):
        raise UserError(f"{path}: {runtime} has no device '{name}' on this machine; use cpu")
    return torch.device(name)


Runtime = OnnxRuntime | OpenVinoRuntime | TorchRuntime
RUNTIMES = {".onnx": OnnxRuntime, ".xml": OpenVinoRuntime, ".pt2": TorchRuntime}
