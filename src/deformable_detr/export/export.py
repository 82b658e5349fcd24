"""Export a model: trace, write to a temporary folder, verify, then move the file into place."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.export import ExportedProgram

from ..detector import DeformableDETR
from ..runtimes.detector import ExportedDetector, load_exported
from ..runtimes.metadata import ExportMetadata
from ..utils.errors import UserError
from ..utils.files import EXPORT_SUFFIXES, prepare_files
from ..utils.packages import need
from .formats import write_file
from .graph import InferenceGraph, Sampling, trace
from .quantization import INT8_MODULES, CalibrationImages, import_nncf, quantize
from .verify import BOX_TOLERANCE, LOGIT_TOLERANCE, VerifiedCase, verify

Format = Literal["onnx", "openvino", "torch"]
Precision = Literal["fp32", "fp16", "int8"]
MAX_AP_LOSS = 0.005  # of fp16 and int8
# Of logits and boxes. fp16 and int8 may select other proposals as queries, so only shapes and finite values are checked
# here; the AP decides.
TOLERANCES = {"fp32": (LOGIT_TOLERANCE, BOX_TOLERANCE), "fp16": (1e3, 1.0), "int8": (1e3, 1.0)}
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino"), "torch": ()}


@dataclass(frozen=True)
class ExportOptions:
    """Options of `export_model`.

    Attributes:
        precision: "fp16" halves the file; "int8" (not for "torch") also quantizes activations. Both need `data`.
        image_size: (height, width) of all inputs, at least 32 pixels each. None: any size. The batch size is dynamic.
        post_processing: Also return boxes in pixels, scores and labels; see `graph.InferenceGraph`.
        sampling: "gather" for runtimes that lack GridSample or compute it incorrectly.
        data: Dataset that AP is measured on. int8 is calibrated on its train split.
        split: Split that AP is measured on.
        limit: Number of images that AP is measured on. None: all.
    """

    precision: Precision = "fp32"
    image_size: tuple[int, int] | None = None
    post_processing: bool = False
    sampling: Sampling = "grid_sample"
    data: str | os.PathLike[str] | None = None
    split: str = "val"
    limit: int | None = None


class ExportResult(NamedTuple):
    """The file, its differences from the model, and, if a dataset was given, the AP of the model and of the file."""

    path: Path
    cases: list[VerifiedCase]
    ap_before: float | None
    ap_after: float | None


def export_model(
    model: DeformableDETR,
    out: str | os.PathLike[str],
    to: Format,
    options: ExportOptions | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> ExportResult:
    """Write a model as a file for another runtime. Nothing is written if the file's outputs differ from the model's.

    Args:
        model: Not changed.
        out: File name that ends in .onnx, .xml (OpenVINO; a .bin file is written beside it) or .pt2.
        to: Format of the file.
        options: Default: fp32, any image size.
        report: Called with one line per finished step.

    Raises:
        UserError: An option is invalid, the model cannot be exported, the file cannot be written, its outputs differ,
            or its AP is more than `MAX_AP_LOSS` lower.
    """
    path, options = Path(out), options or ExportOptions()
    _check_options(path, to, options)
    for package in _PACKAGES[to]:
        need(package)
    if options.precision == "int8":
        import_nncf()
    return _Exporter(model, path, to, options, report).run()


class _Exporter:
    def __init__(
        self, model: DeformableDETR, path: Path, to: Format, options: ExportOptions, report: Callable[[str], None]
    ) -> None:
        self.model = copy.deepcopy(model).cpu().float().eval()
        self.path, self.to, self.options, self.report = path, to, options, report
        config = self_contained_config(self.model)
        self.metadata = ExportMetadata(
            config, options.image_size, options.precision, options.sampling, options.post_processing
        )

    def run(self) -> ExportResult:
        precision = self.options.precision
        program = self._trace()
        variants = self._variants()
        with write_errors(self.path):
            folder = Path(tempfile.mkdtemp(prefix=f".{self.path.stem}-", dir=self.path.parent))
        try:
            ap_before = None if self.options.data is None else self._evaluate(self.model)
            aps: list[float] = []
            for name, transform in variants.items():  # the first one whose AP is high enough
                cases, ap = self._write_and_verify(program, folder, name, transform)
                if ap_before is None or ap is None:
                    break
                aps.append(ap)
                self.report(f"AP {ap_before:.4f} before, {ap:.4f} after")
                if ap >= ap_before - MAX_AP_LOSS:
                    break
            else:
                raise UserError(
                    f"refused: {precision} lowers AP from {ap_before:.4f} to {max(aps):.4f}, by more than "
                    f"{MAX_AP_LOSS}; nothing was written, use fp32"
                )
            with write_errors(self.path):
                move_into_place(folder, self.path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return ExportResult(self.path, cases, ap_before, aps[-1] if aps else None)

    def _trace(self) -> ExportedProgram:
        # OpenVINO stores fp16 weights, but the device decides on the precision of computations.
        half = self.options.precision == "fp16" and self.to != "openvino"
        graph = InferenceGraph(self.model, self.options.post_processing, torch.half if half else torch.float32)
        with memory_errors(self.options.image_size):
            program = trace(graph, self.options.image_size, self.options.sampling)
        self.report("traced")
        return program

    def _variants(self) -> dict[str, Callable[[Any], Any]]:
        """Changes of the ONNX model to try, by name, the fastest result first."""
        if self.options.precision != "int8":
            return {self.options.precision: lambda proto: proto}
        assert self.options.data is not None  # `_check_options`
        images = CalibrationImages(self.metadata, self.options.data)
        self.report(f"calibrating on {len(images)} training images")
        per_channel = self.to == "openvino"
        return {
            f"int8 in {name}": partial(quantize, images=images, modules=modules, per_channel=per_channel)
            for name, modules in INT8_MODULES.items()
        }

    def _write_and_verify(
        self, program: ExportedProgram, folder: Path, name: str, transform: Callable[[Any], Any]
    ) -> tuple[list[VerifiedCase], float | None]:
        """The verified cases of one variant, and its AP if there is a dataset."""
        path = folder / self.path.name
        with write_errors(self.path):
            write_file(self.to, program, path, self.metadata, transform)
        size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
        self.report(f"written, {size:.1f} MiB" + (f", {name}" if self.options.precision == "int8" else ""))
        exported = load_exported(path, "cpu")
        with memory_errors(self.options.image_size):
            cases = verify(self.model, exported, TOLERANCES[self.options.precision])
        for case in cases:
            self.report(f"verified {case}")
        return cases, None if self.options.data is None else self._evaluate(exported)

    def _evaluate(self, detector: DeformableDETR | ExportedDetector) -> float:
        from ..evaluation import evaluate

        data = self.options.data
        assert data is not None
        ap = evaluate(detector, data, split=self.options.split, batch_size=1, limit=self.options.limit)["AP"]
        if ap is None:
            raise UserError(f"--data {data}: its {self.options.split} split has no objects, so AP cannot be measured")
        return ap


def _check_options(path: Path, to: str, options: ExportOptions) -> None:
    size = options.image_size
    if path.suffix != EXPORT_SUFFIXES[to]:
        raise UserError(f"--out {path}: the name of a file for {to} must end in {EXPORT_SUFFIXES[to]}")
    if options.precision == "int8" and to == "torch":
        raise UserError("--precision int8: not supported for torch; use --to onnx or --to openvino")
    if options.precision != "fp32" and options.data is None:
        raise UserError(f"--precision {options.precision} needs --data DATA, to measure the loss of AP")
    if size is not None and min(size) < 32:
        raise UserError(f"--image-size {size[0]},{size[1]}: each side must be at least 32 pixels")
    prepare_files({"--out": path})
    weights = path.with_suffix(".bin")
    if to == "openvino" and weights.exists() and (weights.is_dir() or not path.exists()):
        raise UserError(f"--out {path}: its weights would replace {weights}, another file; choose another name")


def self_contained_config(model: DeformableDETR):
    """Return the model's config with its normalization and without downloads."""
    mean, std = (model.get_buffer(name).tolist() for name in ("pixel_mean", "pixel_std"))
    return model.config.without_pretrained_backbone().replace(pixel_mean=tuple(mean), pixel_std=tuple(std))


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Raise UserError for an OSError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror or error}") from None


@contextmanager
def memory_errors(image_size: tuple[int, int] | None) -> Iterator[None]:
    """Raise UserError if images of a fixed size need more memory than the machine has."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if image_size is None or not (isinstance(error, MemoryError) or "allocate memory" in str(error)):
            raise
        height, width = image_size
        message = f"--image-size {height},{width}: not enough memory for images of this size; choose a smaller one"
        raise UserError(message) from None


def move_into_place(folder: Path, path: Path) -> None:
    """Move the files in `folder` beside `path`, the one with its name last.

    OpenVINO reads a graph with any weights beside it, so an old graph is removed before new weights arrive.
    """
    *weights, named = sorted(folder.iterdir(), key=lambda file: file.name == path.name)
    for file in (*weights, named):
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
    for file in weights:
        old_graph = folder / f"{path.name}.old"
        if path.exists():
            os.replace(path, old_graph)
        try:
            os.replace(file, path.parent / file.name)
        except OSError:
            if old_graph.exists():
                os.replace(old_graph, path)
            raise
    os.replace(named, path)
