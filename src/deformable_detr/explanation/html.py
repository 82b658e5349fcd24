"""One self-contained page of a trace: hover a detection and see its points; it loads nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..utils.files import write_text
from ..visualize.web.html import fill, picture
from .plot import COLORS, check_layer
from .results import DetectionExplanation, Explanation, PointExplanation
from .trace import Trace
from .viewport import close_up

MOST_DETECTIONS = 50
LONGEST_SIDE = 1600  # of the picture in the page, in pixels
PLACES, WEIGHTS = 10, 10000  # positions travel in tenths of a pixel, weights in ten-thousandths, as page.js has it


def page(traced: Trace, chosen: Explanation, layer: int | None = None) -> str:
    """HTML with the image and what is to be shown of it.

    chosen: a detection of the trace, at which the page starts; the others, at most 50, are there to choose too. Or a
        point, which then is alone. layer: where the slider starts, counted from 0; none: the last.
    Raises UserError for a layer that is not there.
    """
    if layer is not None:
        check_layer(chosen, layer)
    shown: list[Explanation] = [chosen]
    if isinstance(chosen, DetectionExplanation):
        numbers = sorted({*range(min(len(traced.detections), MOST_DETECTIONS)), chosen.index})
        shown = [chosen if number == chosen.index else traced.detection(number) for number in numbers]
    weights = shown[0].layers[0].weights
    height, width = traced.image_size
    content = {
        "title": f"{Path(traced.detections.path).name}: where the detector looked"
        if traced.detections.path
        else "Where the detector looked",
        "image": picture(Image.fromarray(traced.pixels.permute(1, 2, 0).numpy()), LONGEST_SIDE, quality=88),
        "width": width,
        "height": height,
        "levels": [list(shape) for shape in chosen.spatial_shapes],
        "heads": weights.shape[-3],
        "points": weights.shape[-1],
        "heaviest": max(float(look.weights.max()) for one in shown for look in one.layers),
        "colors": _colors(),
        "first": shown.index(chosen),
        "layer": layer,
        "items": [_item(one) for one in shown],
    }
    return fill(
        "deformable_detr.visualize.web",
        "explain/page.html",
        str(content["title"]),
        content,
        ["explain/page.css"],
        ["explain/page.js"],
    )


def save_page(traced: Trace, chosen: Explanation, path: Path, layer: int | None = None) -> Path:
    """Writes `page`. Raises UserError where that cannot be done."""
    write_text(path, page(traced, chosen, layer))
    return path


def _item(explanation: Explanation) -> dict[str, Any]:
    layers: list[dict[str, Any]] = [{"points": _points(look.locations, look.weights)} for look in explanation.layers]
    view = close_up(explanation)
    item: dict[str, Any] = {"layers": layers, "view": _round([view.x1, view.y1, view.width, view.height])}
    if isinstance(explanation, DetectionExplanation):
        shares = explanation.attention_inside_box().tolist()
        for layer, look, share in zip(layers, explanation.looks, shares, strict=True):
            layer["reference"] = _round(look.reference_point.tolist())
            layer["referenceBox"] = None if look.reference_box is None else _round(look.reference_box.tolist())
            layer["box"] = _round(look.box.tolist())
            layer["score"] = round(float(look.scores[explanation.label]), 4)
            layer["share"] = round(share, 4)
        facts = {"kind": "detection", "name": explanation.name, "score": round(explanation.score, 4)}
        return {**item, **facts, "box": _round(explanation.box.tolist())}
    assert isinstance(explanation, PointExplanation)
    here = np.array(explanation.point)
    for layer, look in zip(layers, explanation.looks, strict=True):
        distances = np.linalg.norm(look.locations.numpy() - here, axis=-1)
        layer["distance"] = round(float((distances * look.weights.numpy()).sum() / look.weights.sum()), 1)
    return {**item, "kind": "point", "point": _round(explanation.point)}


def _points(locations: Any, weights: Any) -> list[int]:
    """x, y and weight of each point in turn, as whole numbers, in the order (T,) M, L, P."""
    # Far away is far away: a number that JSON can hold is enough.
    places = (locations.numpy().astype(np.float64) * PLACES).clip(-1e7, 1e7)
    heavy = weights.numpy()[..., None].astype(np.float64) * WEIGHTS
    return np.concatenate([places, heavy], axis=-1).round().astype(int).reshape(-1).tolist()


def _round(values: Any) -> list[float]:
    return [round(float(value), 2) for value in values]


def _colors(steps: int = 17) -> list[list[int]]:
    from matplotlib import colormaps

    return [[round(255 * part) for part in color[:3]] for color in colormaps[COLORS](np.linspace(0, 1, steps))]
