"""`deformable-detr explain`."""

from __future__ import annotations

from pathlib import Path

from .options import Device, JsonFile, PyTorchModel, Threshold


def explain(
    model: PyTorchModel,
    image: Path,
    /,
    *,
    detection: int | None = None,
    point: str | None = None,
    layer: str = "all",
    out: Path | None = None,
    threshold: Threshold = 0.5,
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Explain a detection: show the boxes and sampling points of each layer.

    Args:
        image: Image file.
        detection: Number of the detection, from 1, the best. Default: 1.
        point: X,Y in pixels: explain what the encoder sampled for this point instead of a detection.
        layer: all, or the number of a layer, from 1.
        out: Image (.png, .jpg), animation over the layers (.gif) or interactive web page (.html). Default:
            IMAGE-explained.png in the current folder.
    """
    from ..detector import load_detector
    from .explain_file import ExplainOptions, explain_file, parse_layer, parse_point

    out = out or Path(f"{image.stem}-explained.png")
    options = ExplainOptions(out, detection, parse_point(point), parse_layer(layer), threshold, json)
    options.check(image)
    explain_file(load_detector(model, device), image, options)
