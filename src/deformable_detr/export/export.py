"""Export a model: trace, write to a temporary folder, verify, then move the file into place."""

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch

from ..predict.predictor import Detector
from ..runtimes.detector import ExportedDetector, load_exported
from ..runtimes.metadata import ExportMetadata
from ..utils.errors import UserError
from ..utils.failures import explain_machine_errors
from ..utils.files import EXPORT_SUFFIXES, prepare_files
from ..utils.packages import need
from ..utils.progress import stage_bar
from .formats import convert_to_onnx, write_file
from .graph import InferenceGraph, Sampling, trace
from .quantization import CalibrationImages, import_nncf, quantize
from .verify import BOX_TOLERANCE, LOGIT_TOLERANCE, MASK_IOU, VerifiedCase, verify

Format = Literal["onnx", "openvino", "torch"]
Precision = Literal["fp32", "fp16", "int8"]
MAX_AP_LOSS = 0.005  # of fp16 and int8
# Of logits, boxes and the IoU of masks. fp16 and int8 may select other proposals as queries, so only shapes and finite
# values are checked here; the AP decides.
TOLERANCES = {
    "fp32": (LOGIT_TOLERANCE, BOX_TOLERANCE, MASK_IOU),
    "fp16": (1e3, 1.0, 0.0),
    "int8": (1e3, 1.0, 0.0),
}
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino"), "torch": ()}


@dataclass(frozen=True)
class ExportOptions:
    """Options of `export_model`.

    Attributes:
        precision: "fp16" halves the file; "int8" (not for "torch") also quantizes activations. Both need `data`.
        image_size: (height, width) of all inputs, at least 32 pixels each. None: any size, or the model's own if it
            stretches all images to one size. The batch size is dynamic.
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
    model: Detector,
    out: str | os.PathLike[str],
    to: Format,
    options: ExportOptions | None = None,
    report: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> ExportResult:
    """Write a model as a file for another runtime, unless its outputs (fp32) or AP (fp16, int8) differ too much.

    Args:
        model: Not changed.
        out: File name that ends in .onnx, .xml (OpenVINO; a .bin file is written beside it) or .pt2.
        to: Format of the file.
        options: Default: fp32, any image size.
        report: Called with one line per finished step.
        progress: Show the current step while it runs.

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
    exporter = _Exporter(model, path.name, to, options, report)
    with (
        stage_bar("export", exporter.num_stages, progress) as exporter.bar,
        explain_machine_errors(1, 0, "choose a smaller --image-size"),
        tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as folder,
    ):
        cases, ap_before, ap_after = exporter.run(Path(folder))
        move_into_place(Path(folder), path)
    return ExportResult(path, cases, ap_before, ap_after)


class _Exporter:
    def __init__(
        self, model: Detector, name: str, to: Format, options: ExportOptions, report: Callable[[str], None]
    ) -> None:
        config = model.export_config()
        options = replace(options, image_size=model.export_size(options.image_size))
        if options.precision == "int8" and not model.int8_modules:
            raise UserError("--precision int8: not supported for this model; use fp32 or fp16")
        self.model = copy.deepcopy(model).cpu().float().eval()
        self.name, self.to, self.options, self.report = name, to, options, report
        self.bar = stage_bar("export", None, show=False)
        self.metadata = ExportMetadata(
            config, options.image_size, options.precision, options.sampling, options.post_processing
        )

    @property
    def num_stages(self) -> int | None:
        """Number of steps; None for int8, which tries several forms."""
        steps = 3 + (self.to != "torch") + 2 * (self.options.data is not None)
        return None if self.options.precision == "int8" else steps

    def run(self, folder: Path) -> tuple[list[VerifiedCase], float | None, float | None]:
        """Write a verified file in `folder`. Return the verified cases and the AP of the model and of the file."""
        options = self.options
        # OpenVINO stores fp16 weights, but the device decides on the precision of computations.
        half = options.precision == "fp16" and self.to != "openvino"
        graph = InferenceGraph(self.model, options.post_processing, torch.half if half else torch.float32)
        self.bar.stage("trace the model")
        program = trace(graph, options.image_size, options.sampling)
        self.report("traced")
        if self.to == "torch":
            converted = program
        else:
            self.bar.stage("convert to ONNX")
            converted = convert_to_onnx(program, self.metadata)
        ap_before = None if options.data is None else self._evaluate(self.model)
        aps: list[list[float]] = []
        for name, variant in self._variants(converted):
            exported, cases = self._write_and_verify(variant, folder / self.name, name)
            if ap_before is None:
                return cases, None, None
            aps.append(self._evaluate(exported))
            before, after = ap_before, aps[-1]
            text = "; ".join(
                f"{kind} {old:.4f} before, {new:.4f} after"
                for kind, old, new in zip(("AP", "mask AP"), before, after, strict=False)
            )
            self.report(text)
            if _loss(before, after)[0] <= MAX_AP_LOSS:
                return cases, before[0], after[0]
        assert ap_before is not None
        _, kind, old, new = min(_loss(ap_before, values) for values in aps)
        raise UserError(
            f"refused: {options.precision} lowers {kind} from {old:.4f} to {new:.4f}, by more than {MAX_AP_LOSS}; "
            "nothing was written, use fp32"
        )

    def _variants(self, converted: Any) -> Iterator[tuple[str, Any]]:
        """Name and graph of each form to try, the fastest first."""
        if self.options.precision != "int8":
            yield "", converted
            return
        images = CalibrationImages(self.metadata, cast(Path, self.options.data))
        self.report(f"calibrating on {len(images)} training images")
        for name, modules in self.model.int8_modules.items():
            self.bar.stage(f"quantize {name}")
            yield f", int8 in {name}", quantize(converted, images, modules, per_channel=self.to == "openvino")

    def _write_and_verify(self, graph: Any, path: Path, name: str) -> tuple[ExportedDetector, list[VerifiedCase]]:
        self.bar.stage(f"write {self.name}")
        write_file(self.to, graph, path, self.metadata)
        size = sum(file.stat().st_size for file in path.parent.iterdir()) / 2**20
        self.report(f"written, {size:.1f} MiB{name}")
        exported = load_exported(path, "cpu")
        self.bar.stage(f"verify {self.name}")
        cases = verify(self.model, exported, TOLERANCES[self.options.precision])
        for case in cases:
            self.report(f"verified {case}")
        return exported, cases

    def _evaluate(self, detector: Detector) -> list[float]:
        """Return the AP of boxes and, if model and dataset have masks, of masks."""
        from ..evaluation import evaluate

        data = cast(Path, self.options.data)
        self.bar.stage("measure AP")
        show = not self.bar.disable
        metrics = evaluate(
            detector, data, split=self.options.split, batch_size=1, limit=self.options.limit, progress=show
        )
        aps = [metrics["AP"], *([metrics["segm"]["AP"]] if "segm" in metrics else [])]
        if None in aps:
            raise UserError(f"--data {data}: its {self.options.split} split has no objects, so AP cannot be measured")
        return aps


def _loss(before: list[float], after: list[float]) -> tuple[float, str, float, float]:
    """Return the largest loss of the APs of boxes and masks, which it is of, and the AP before and after."""
    rows = zip(("AP", "mask AP"), before, after, strict=False)
    return max((old - new, kind, old, new) for kind, old, new in rows)


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
