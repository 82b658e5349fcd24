"""A model at work: evaluate, predict, explain."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..utils.errors import UserError
from .app import app
from .options import DataOverrides, Device, JsonFile, Precision, at_least, at_least_one, complain, table


@app.command
def evaluate(
    model: Path,
    data: Path,
    *,
    split: str = "val",
    report: Path | None = None,
    compare: Path | None = None,
    batch_size: int = 4,
    workers: int = 2,
    device: Device = "auto",
    precision: Precision | None = None,
    set_: DataOverrides = None,
    json: JsonFile = None,
) -> None:
    """Measure a model on a data set: COCO's twelve figures and the AP of each class.

    Args:
        model: Folder of a run or of a saved model, or an exported file (.onnx, .xml, .pt2).
        data: Folder of the data set.
        split: Which part of the data set.
        report: File (.html) for a page with curves, kinds of errors, calibration and the worst images.
        compare: Another model, to be measured too and shown beside.
        batch_size: Images at once.
        workers: Processes that load images.
        precision: fp32 or bf16: of the optimized model, as predict uses it; without it, the model as it was trained.
    """
    from ..config.resolve import resolve_config
    from ..evaluation.evaluator import compare_metrics, evaluate_models
    from ..utils.files import prepare_files, write_json

    if report is not None and report.suffix.lower() not in {".html", ".htm"}:
        raise UserError(f"--report {report}: must end in .html")
    at_least_one(batch_size=batch_size)
    at_least(0, workers=workers)
    prepare_files({"--report": report, "--json": json})
    if other := next((item for item in set_ or () if not item.startswith("data.")), None):
        raise UserError(f"--set {other}: only keys of the data, such as data.val_images; the rest is the model's own")
    models = [model] if compare is None else [model, compare]
    data_config = resolve_config(None, None, set_ or (), {}).data
    results = evaluate_models(
        models, data, split, data_config, device, precision, batch_size=batch_size, workers=workers
    )
    if compare is not None:
        print(", ".join(f"{letter}: {result.name}" for letter, result in zip("AB", results, strict=True)))
    print(table(*(result.metrics for result in results)))
    if json is not None:
        write_json(json, compare_metrics(results))
    if report is not None:
        from ..evaluation.report import write_report

        print(f"report in {write_report(report, results, data.resolve().name, split)}")


@app.command
def predict(
    model: Path,
    sources: Annotated[list[Path] | None, Parameter(negative=())] = None,
    /,
    *,
    camera: int | None = None,
    out: Path | None = None,
    threshold: float = 0.5,
    batch_size: int = 4,
    device: Device = "auto",
    precision: Precision = "fp32",
    json: JsonFile = None,
) -> None:
    """Find the objects in images, videos or what a camera sees.

    Args:
        model: A run or model folder, a transformers folder or hub id, an official .pth, or an exported file (.onnx,
            .xml, .pt2).
        sources: Image and video files, and folders of them.
        camera: Number of a camera, 0 is the first; it runs until Ctrl-C.
        out: Folder for the images and videos with the boxes drawn on. A video, and beside it a JSON line for each of
            its frames, is written in any case: without a folder as NAME-detected.mp4.
        threshold: Lowest score of a detection, 0 to 1.
        batch_size: Frames of a video at once.
        precision: fp32, or bf16 where the processor or GPU has it.
    """
    from ..detector import load_detector
    from .predict_files import find_sources, predict_files

    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold {threshold}: must be from 0 to 1")
    at_least_one(batch_size=batch_size)
    at_least(0, camera=camera)
    if not sources and camera is None:
        raise UserError("nothing to look at: give IMAGES, videos or folders of them, or a camera by --camera")
    files = find_sources(sources or [])
    detector = load_detector(model, device, precision)
    if predict_files(detector, files, out, threshold, json, print, complain, camera, batch_size):
        sys.exit(2)


@app.command
def explain(
    model: Path,
    image: Path,
    /,
    *,
    detection: int | None = None,
    point: str | None = None,
    layer: str = "all",
    out: Path | None = None,
    threshold: float = 0.5,
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Explain a detection: show the boxes and sampling points of each layer.

    Args:
        model: A run or model folder, a transformers folder or hub id, or an official .pth.
        image: Image file.
        detection: Number of the detection, from 1, the best. Default: 1.
        point: X,Y in pixels: explain what the encoder sampled for this point instead of a detection.
        layer: all, or the number of a layer, from 1.
        out: Image (.png, .jpg), animation over the layers (.gif) or interactive web page (.html). Default:
            IMAGE-explained.png in the current folder.
        threshold: Minimum score of a detection, 0 to 1.
    """
    from ..detector import load_detector
    from .explain_file import ExplainOptions, explain_file, parse_layer, parse_point

    out = out or Path(f"{image.stem}-explained.png")
    options = ExplainOptions(out, detection, parse_point(point), parse_layer(layer), threshold, json)
    options.check(image)
    explain_file(load_detector(model, device), image, options)
