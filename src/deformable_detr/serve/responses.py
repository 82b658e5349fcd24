"""Response bodies as plain values, in the shapes of `schemas`."""

from __future__ import annotations

from typing import Any

from ..explanation import DecoderLayerSampling, Trace
from ..structures import Detections


def detected_image(detections: Detections, name: str | None) -> dict[str, Any]:
    """Return the `schemas.DetectedImage` of an image."""
    result = detections.to_dict()
    del result["image"]
    return {"name": name, **result}


def explained_image(traced: Trace, name: str | None) -> dict[str, Any]:
    """Return the `schemas.Explained` of an image."""
    detections = []
    for index, record in enumerate(traced.detections.to_dict()["detections"]):
        explanation = traced.detection(index)
        layers = zip(explanation.layer_summaries(), explanation.layers, strict=True)
        detections.append({**record, "layers": [{**summary, "points": _points(layer)} for summary, layer in layers]})
    height, width = traced.image_size
    return {
        "name": name,
        "height": height,
        "width": width,
        "levels": [list(shape) for shape in traced.spatial_shapes],
        "heads": traced.outputs["decoder_attention"][0].weights.shape[2],
        "detections": detections,
    }


def _points(layer: DecoderLayerSampling) -> list[list[float]]:
    """[x, y, weight, level, head] of each sampling point, in the order M, L, P."""
    locations = layer.locations.clamp(-1e6, 1e6).tolist()
    weights = layer.weights.tolist()
    return [
        [round(x, 1), round(y, 1), round(weight, 5), level, head]
        for head, levels in enumerate(locations)
        for level, points in enumerate(levels)
        for (x, y), weight in zip(points, weights[head][level], strict=True)
    ]
