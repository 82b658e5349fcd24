"""Runtimes of exported files: ONNX Runtime, OpenVINO and PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..utils.errors import UserError, first_line
from ..utils.packages import need, quiet_exporter
from .metadata import _DESCRIPTION, METADATA_KEYS


class Runtime(Protocol):
    """A file that runs: `strings` is its metadata, `device` where its outputs are; inputs may be anywhere."""

    strings: dict[str, str]
    device: torch.device

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]: ...


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
            raise UserError(f"{path} cannot be opened by onnxruntime: {first_line(error)}") from None
        self.path, self.device = path, torch.device("cpu")
        self.strings: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        self.names = [value.name for value in self.session.get_inputs()]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        arrays = {name: value.cpu().numpy() for name, value in zip(self.names, inputs, strict=True)}
        try:
            found = self.session.run(None, arrays)
        except Exception as error:  # as above
            raise UserError(f"{self.path} fails in onnxruntime: {first_line(error)}") from None
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
            raise UserError(f"{path} cannot be opened by OpenVINO: {first_line(error)}") from None
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
            with quiet_exporter():
                program = torch.export.load(path, extra_files=keys)
        except Exception as error:  # whatever the archive's reader raises: it is the file that is wrong
            raise UserError(f"{path} cannot be opened by PyTorch: {first_line(error)}") from None
        self.strings = {key.removeprefix(f"{_DESCRIPTION}."): text for key, text in keys.items() if text}
        if self.device.type != "cpu":
            program = move_to_device_pass(program, str(self.device))
        # Its guards repeat what the tracer assumed of layouts; sizes were verified when the file was written.
        self.module = program.module(check_guards=False)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(self.module(*(value.to(self.device) for value in inputs)))


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
