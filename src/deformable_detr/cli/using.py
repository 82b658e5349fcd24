"""A model at work: evaluate, predict, explain."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..errors import UserError
from .options import Device, JsonFile, complain, table
from .program import app


@app.command
def evaluate(
    model: Path,
    data: Path,
    *,
    split: str = "val",
    batch_size: int = 4,
    workers: int = 2,
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Measure a model on a data set: COCO's twelve figures and the AP of each class.

    Args:
        model: Folder of a run or of a saved model, or an exported file (.onnx, .xml, .pt2).
        data: Folder of the data set.
        split: Which part of the data set.
        batch_size: Images at once.
        workers: Processes that load images.
    """
    from ..evaluation import evaluate
    from ..inference.files import prepare_file, write_json
    from ..inference.loading import load_detector

    if json is not None:
        prepare_file(json, "--json")
    detector = load_detector(model, device)
    metrics = evaluate(detector, data, split=split, batch_size=batch_size, workers=workers)
    print(table(metrics))
    if json is not None:
        write_json(json, metrics)


@app.command
def predict(
    model: Path,
    images: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    out: Path | None = None,
    threshold: float = 0.5,
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Find the objects in images.

    Args:
        model: Folder of a run or of a saved model, or an exported file (.onnx, .xml, .pt2).
        images: Image files, and folders of them.
        out: Folder for the images with the boxes drawn on.
        threshold: Lowest score of a detection, 0 to 1.
    """
    from ..inference.files import find_images, predict_files
    from ..inference.loading import load_detector

    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold {threshold}: must be from 0 to 1")
    files = find_images(images)
    detector = load_detector(model, device)
    if predict_files(detector, files, out, threshold, json, complain=complain):
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
    """Show where the model looked: each layer's boxes and sampling points.

    Args:
        model: Folder of a run or of a saved model.
        image: Image file.
        detection: Which detection, numbered from 1, the best; without it that one.
        point: X,Y in pixels: where the encoder looked from that point, instead of a detection.
        layer: all, or one, numbered from 1.
        out: Picture (.png, .jpg), animation across the layers (.gif, .webp, .apng) or interactive page (.html);
            IMAGE-explained.png in the current folder where none is named.
        threshold: Lowest score of a detection, 0 to 1.
    """
    from ..device import pick_device
    from ..explanation.files import explain_file, parse_layer, parse_point
    from ..model.detector import DeformableDETR

    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold {threshold}: must be from 0 to 1")
    place, number = parse_point(point), parse_layer(layer)
    detector = DeformableDETR.from_pretrained(model).to(pick_device(device))
    target = out or Path(f"{image.stem}-explained.png")
    explain_file(detector, image, target, detection, place, number, threshold, json)
