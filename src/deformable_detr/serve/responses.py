"""Answers as plain values, in the shape of `schemas`."""

from __future__ import annotations

from typing import Any

from ..structures import Detections


def detected(found: Detections, name: str | None) -> dict[str, Any]:
    """One image's `DetectedImage`."""
    record = found.to_dict()
    del record["image"]
    return {"name": name, **record}


def explained(traced: Any, name: str | None) -> dict[str, Any]:
    """`Explained` of an `explanation.Trace`. Positions are rounded to tenths of a pixel."""
    height, width = traced.image_size
    records = traced.detections.to_dict()["detections"]
    attention = traced.outputs["decoder_attention"][0].weights  # (1, Q, M, L, P)
    return {
        "name": name,
        "height": height,
        "width": width,
        "levels": [[int(side) for side in shape] for shape in traced.outputs["spatial_shapes"]],
        "heads": attention.shape[2],
        "detections": [{**record, "layers": _layers(traced.detection(i))} for i, record in enumerate(records)],
    }


def _layers(explanation: Any) -> list[dict[str, Any]]:
    shares = explanation.attention_inside_box().tolist()
    return [
        {
            "reference_point": _rounded(look.reference_point.tolist()),
            "reference_box": None if look.reference_box is None else _rounded(look.reference_box.tolist()),
            "box": _rounded(look.box.tolist()),
            "score": look.scores[explanation.label].item(),
            "share_inside_box": share,
            "points": _points(look),
        }
        for look, share in zip(explanation.looks, shares, strict=True)
    ]


def _points(look: Any) -> list[list[float]]:
    # Far away is far away: a number that JSON can hold is enough.
    places = look.locations.clamp(-1e6, 1e6).tolist()  # M, L, P, 2
    weights = look.weights.tolist()
    return [
        [round(x, 1), round(y, 1), round(weight, 5), level, head]
        for head, levels in enumerate(places)
        for level, points in enumerate(levels)
        for (x, y), weight in zip(points, weights[head][level], strict=True)
    ]


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 1) for value in values]
