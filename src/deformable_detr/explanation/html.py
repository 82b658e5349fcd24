"""A self-contained web page of an explanation: hover or choose a detection to see its sampling points."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..visualize.web.html import jpeg_data_uri, render_page
from .explanation import DetectionExplanation, Explanation, PointExplanation
from .trace import Trace

MAX_DETECTIONS = 50
MAX_IMAGE_SIDE = 1600  # pixels of the embedded image
SCALE = (10, 10, 10000)  # x and y are stored in tenths of a pixel, weights in ten-thousandths, as explain.js expects


def page(traced: Trace, selected: Explanation, layer: int | None = None) -> str:
    """Return the page as HTML.

    Args:
        traced: The trace of the image.
        selected: The detection to show first, with up to 50 others to choose from, or a point, shown alone.
        layer: The layer to show first, counted from 0; it must exist. Default: the last.
    """
    if layer is not None:
        selected.check_layer(layer)
    explanations: list[Explanation] = [selected]
    if isinstance(selected, DetectionExplanation):
        indices = sorted({*range(min(len(traced.detections), MAX_DETECTIONS)), selected.index})
        explanations = [selected if index == selected.index else traced.detection(index) for index in indices]
    path, (height, width) = traced.detections.path, traced.image_size
    content = {
        "image": jpeg_data_uri(Image.fromarray(traced.pixels.permute(1, 2, 0).numpy()), MAX_IMAGE_SIDE, quality=88),
        "width": width,
        "height": height,
        "levels": [list(shape) for shape in selected.spatial_shapes],
        "heads": selected.layers[0].weights.shape[-3],
        "first": explanations.index(selected),
        "layer": layer,
        "items": [_item(explanation) for explanation in explanations],
    }
    title = f"Explanation of {Path(path).name}" if path else "Explanation"
    return render_page("explain", title, content, ["viewer.css", "explain.css"], ["viewer.js"])


def _item(explanation: Explanation) -> dict[str, Any]:
    view = explanation.viewport()
    item: dict[str, Any] = {"view": [round(side, 2) for side in (view.x1, view.y1, view.width, view.height)]}
    if isinstance(explanation, DetectionExplanation):
        layers = explanation.layer_summaries()
        box = [round(side, 2) for side in explanation.box.tolist()]
        item |= {"kind": "detection", "name": explanation.name, "score": round(explanation.score, 4), "box": box}
    else:
        assert isinstance(explanation, PointExplanation)
        layers = []
        for locations, weights in explanation.layers:
            distances = (locations - locations.new_tensor(explanation.point)).norm(dim=-1)
            layers.append({"mean_distance": round(((distances * weights).sum() / weights.sum()).item(), 1)})
        item |= {"kind": "point", "point": list(explanation.point)}
    points = [_points(layer.locations.numpy(), layer.weights.numpy()) for layer in explanation.layers]
    return {**item, "layers": [{**layer, "points": flat} for layer, flat in zip(layers, points, strict=True)]}


def _points(locations: np.ndarray, weights: np.ndarray) -> list[int]:
    """x, y and weight of each point as integers, in the order (T,) M, L, P."""
    values = np.concatenate([locations.clip(-1e6, 1e6), weights[..., None]], axis=-1).astype(np.float64)
    values[weights == 0, 2] = -1.0  # fills up a level with fewer points; not drawn
    return (values * SCALE).round().astype(int).ravel().tolist()
