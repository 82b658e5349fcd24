"""`deformable-detr explain`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.errors import UserError
from ..utils.files import prepare_files, write_json, write_text
from ..utils.terminal import echo, printable_name
from .options import Device, JsonFile, Positive, PyTorchModel, Threshold

if TYPE_CHECKING:
    from ..explanation import DetectionExplanation, PointExplanation

PAGE_SUFFIXES = {".html", ".htm"}


def explain(
    model: PyTorchModel,
    image: Path,
    /,
    *,
    detection: Positive | None = None,
    point: str | None = None,
    layer: Positive | None = None,
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
        layer: Number of the only layer to show, from 1. Default: all.
        out: Image (.png, .jpg), animation over the layers (.gif) or interactive web page (.html). Default:
            IMAGE-explained.png in the current folder.
    """
    if detection is not None and point is not None:
        raise UserError("--detection and --point exclude each other; choose one")
    position = None if point is None else _parse_point(point)
    out = out or Path(f"{image.stem}-explained.png")
    _check_outputs(image, out, json)

    from ..detector import load_detector
    from ..explanation import trace
    from ..explanation.html import page
    from ..utils.progress import stage_bar

    with stage_bar("explain", 3) as bar:
        bar.stage("load the model")
        detector = load_detector(model, device)
        bar.stage(f"find what it looks at in {image.name}")
        traced = trace(detector, image, threshold)
        explanation = traced.detection((detection or 1) - 1) if position is None else traced.point(*position)
        layer_index = None if layer is None else layer - 1
        bar.stage(f"write {out.name}")
        if out.suffix.lower() in PAGE_SUFFIXES:
            write_text(out, page(traced, explanation, layer_index))
        else:
            explanation.save(out, layer_index)
    if json is not None:
        write_json(json, explanation.to_dict())
    echo("\n".join([*_summary(explanation), f"wrote {out}" + (f" and {json}" if json else "")]))


def _parse_point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--point {text}: must be X,Y in pixels, such as 120,80") from None
    return x, y


def _check_outputs(image: Path, out: Path, json_file: Path | None) -> None:
    """Raise UserError for wrong output files, before the model runs."""
    from ..visualize.draw import image_format

    outputs = {"--out": out, "--json": json_file}
    prepare_files(outputs)
    if out.suffix.lower() not in PAGE_SUFFIXES:
        image_format(out)
    for option, path in outputs.items():
        if path is not None and path.exists() and image.exists() and path.samefile(image):
            raise UserError(f"{option} {path}: this would overwrite the input image; choose another file")


def _summary(explanation: DetectionExplanation | PointExplanation) -> list[str]:
    """The figures of an explanation as lines for a terminal."""
    from ..explanation import PointExplanation

    lines = [printable_name(explanation.title)]
    if isinstance(explanation, PointExplanation):
        tokens = zip(explanation.spatial_shapes, explanation.token_centers.tolist(), strict=True)
        return lines + [
            f"level {n}, {w} × {h}: token at {x:.1f}, {y:.1f}" for n, ((h, w), (x, y)) in enumerate(tokens, 1)
        ]
    shares = explanation.attention_inside_box().tolist()
    for number, (layer, share) in enumerate(zip(explanation.layers, shares, strict=True), 1):
        box = ", ".join(f"{side:.0f}" for side in layer.box.tolist())
        score = layer.scores[explanation.label]
        lines.append(f"layer {number}: score {score:.2f}, box {box}, {share:.1%} of the attention inside")
    x1, y1, x2, y2 = explanation.box.tolist()
    height, width = explanation.image_size
    area = (x2 - x1) * (y2 - y1) / (width * height)
    return [
        *lines,
        f"attention inside the detected box: first decoder layer {shares[0]:.1%}, last {shares[-1]:.1%} "
        f"(the box covers {area:.1%} of the image)",
    ]
