"""The export: trace, write, verify, and only then put the file in its place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ..detector import DeformableDETR
from ..runtimes.detector import ExportedDetector, load
from ..runtimes.metadata import Described
from ..utils.errors import UserError
from ..utils.files import EXPORT_SUFFIXES, prepare_files
from ..utils.packages import need
from .formats import write
from .graph import InferenceGraph, Sampling, trace
from .quantization import PARTS, Calibration, quantized, quantizer
from .verify import BOXES, LOGITS, Case, verify

Format = Literal["onnx", "openvino", "torch"]
Precision = Literal["fp32", "fp16", "int8"]
AP_LOSS = 0.005  # most AP that fp16 and int8 may cost
# Differences of logits and boxes. In fp16 and int8 other proposals may become queries, so that all is finite and in its
# shape is what this can tell: the AP is the measure.
TOLERANCES = {"fp32": (LOGITS, BOXES), "fp16": (1e3, 1.0), "int8": (1e3, 1.0)}
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino"), "torch": ()}


class Exported(NamedTuple):
    """What an export came to: the file, the differences from the model, and unless fp32 the AP before and after."""

    path: Path
    cases: list[Case]
    ap: tuple[float, float] | None


def export_model(
    model: DeformableDETR,
    out: str | os.PathLike[str],
    to: Format,
    precision: Precision = "fp32",
    image_size: tuple[int, int] | None = None,
    post_processing: bool = False,
    sampling: Sampling = "grid_sample",
    data: str | os.PathLike[str] | None = None,
    split: str = "val",
    limit: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Writes the model as a file for another runtime, or refuses where that file does not compute the same.

    out: ends in .onnx, .xml (OpenVINO; a .bin goes beside it) or .pt2, as `to` says.
    precision: fp16 halves the file, int8 quantizes what bears it (of `quantization.PARTS`), which .pt2 has no form for;
        both need `data`.
    image_size: (height, width) of all inputs; none: any size. The batch is always open.
    post_processing: also boxes in pixels, scores and labels of the best 100; see `graph.InferenceGraph`.
    sampling: gather for runtimes that miscompute or lack GridSample.
    data, split, limit: data set to measure the file on, as in `evaluate`, the AP on which may fall by `AP_LOSS` at
        most; int8 is calibrated on its train split.
    report: gets a line for each step done.

    Raises UserError for a model that cannot be exported, for a file that cannot be written, and for one that differs.
    """
    path = Path(out)
    _check(path, to, precision, image_size, data, model)
    for package in _PACKAGES[to]:
        need(package)
    if precision == "int8":
        quantizer()
    model = _plain(model)
    described = Described(_config(model), image_size, precision, sampling, post_processing)
    half = precision == "fp16" and to != "openvino"  # OpenVINO stores halves and computes as its device can
    graph = InferenceGraph(model, post_processing, torch.half if half else torch.float32)
    with _in_memory(image_size):
        program = trace(graph, image_size, sampling)
    report("traced")
    changes: dict[str, Callable[[Any], Any]] = {precision: lambda proto: proto}
    if precision == "int8":
        assert data is not None
        images = Calibration(described, data)
        report(f"calibrating on {len(images)} training images")
        change = partial(quantized, images=images, by_channel=to == "openvino")
        changes = {f"int8 in {name}": partial(change, parts=parts) for name, parts in PARTS.items()}
    with _writing(path):
        folder = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", dir=path.parent))
    try:
        before = None if data is None else _ap(model, data, split, limit)
        found: list[float] = []
        for name, change in changes.items():  # of int8, the first that costs little enough
            with _writing(path):
                write(to, program, folder / path.name, described.to_strings(), precision, post_processing, change)
            size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
            report(f"written, {size:.1f} MiB" + (f", {name}" if precision == "int8" else ""))
            exported = load(folder / path.name, "cpu")
            with _in_memory(image_size):
                cases = verify(model, exported, TOLERANCES[precision])
            for case in cases:
                report(f"verified {case}")
            if before is not None:
                found.append(_ap(exported, data, split, limit))
                report(f"AP {before:.4f} before, {found[-1]:.4f} after")
            exported = None  # Windows does not move open files
            if before is None or found[-1] >= before - AP_LOSS:
                break
        else:
            raise UserError(f"refused: {precision} takes AP from {before:.4f} to {max(found):.4f}; nothing was written")
        with _writing(path):
            _put(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Exported(path, cases, None if before is None else (before, found[-1]))


def _check(
    path: Path, to: str, precision: str, image_size: tuple[int, int] | None, data: object, model: DeformableDETR
) -> None:
    if path.suffix != EXPORT_SUFFIXES[to]:
        raise UserError(f"--out {path}: a file for {to} ends in {EXPORT_SUFFIXES[to]}")
    if precision == "int8" and to == "torch":
        raise UserError("--precision int8: for onnx and openvino; PyTorch's own file has no form for it")
    if precision != "fp32" and data is None:
        raise UserError(f"--precision {precision} needs --data DATA, to measure what it costs")
    if image_size is not None and min(image_size) < 32:
        raise UserError(f"--image-size {image_size[0]},{image_size[1]}: each side must be 32 pixels at least")
    prepare_files({"--out": path})
    beside = path.with_suffix(".bin")
    if to == "openvino" and beside.exists() and (beside.is_dir() or not path.exists()):
        raise UserError(f"--out {path}: its weights go to {beside}, where there is something else; choose another name")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror or error}") from None


@contextmanager
def _in_memory(image_size: tuple[int, int] | None) -> Iterator[None]:
    """`UserError` where images of that size need more memory than there is."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if image_size is None or not (isinstance(error, MemoryError) or "allocate memory" in str(error)):
            raise
        height, width = image_size
        raise UserError(f"--image-size {height},{width}: this machine's memory does not hold such images") from None


def _plain(model: DeformableDETR) -> DeformableDETR:
    """A copy of the model as its file is compared with it: on the CPU, in fp32, in evaluation mode."""
    import copy

    return copy.deepcopy(model).cpu().float().eval()


def _config(model: DeformableDETR):
    """The config with all that a file has to know by itself."""
    mean, std = (model.get_buffer(name).tolist() for name in ("pixel_mean", "pixel_std"))
    return model.config.without_pretrained_backbone().replace(pixel_mean=tuple(mean), pixel_std=tuple(std))


def _ap(
    model: DeformableDETR | ExportedDetector, data: str | os.PathLike[str] | None, split: str, limit: int | None
) -> float:
    from ..evaluation import evaluate

    assert data is not None  # `_check`

    ap = evaluate(model, data, split=split, batch_size=1, limit=limit)["AP"]
    if ap is None:
        raise UserError(f"--data {data}: no objects in it, so no AP to compare")
    return ap


def _put(folder: Path, path: Path) -> None:
    """The written files to their place, the one that is named last: before it, nothing new is to be found.

    OpenVINO reads a graph with whatever weights lie beside it: an old graph goes before new weights come.
    """
    *beside, named = sorted(folder.iterdir(), key=lambda file: file.name == path.name)
    for file in (*beside, named):
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
    for file in beside:
        before = folder / f"{path.name}.before"
        if path.exists():
            os.replace(path, before)
        try:
            os.replace(file, path.parent / file.name)
        except OSError:
            if before.exists():
                os.replace(before, path)
            raise
    os.replace(named, path)
