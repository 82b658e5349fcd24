"""The command's work: one image, one explanation, the file that its ending asks for, and the figures in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from ..detector import DeformableDETR
from ..explanation.html import save_page
from ..explanation.plot import ANIMATED, check_layer, picture_kind
from ..explanation.results import DetectionExplanation, Explanation, PointExplanation
from ..explanation.trace import trace
from ..utils.errors import UserError
from ..utils.files import prepare_files, write_json

PAGES = {".html", ".htm"}


def explain_file(
    model: DeformableDETR,
    image: Path,
    out: Path,
    detection: int | None = None,
    point: tuple[float, float] | None = None,
    layer: int | None = None,
    threshold: float = 0.5,
    json_file: Path | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Explains a detection or a point of an image and writes what the ending of `out` asks for.

    detection, layer: counted from 1; none: the best detection, all layers. point: (x, y) in pixels.
    json_file: for the raw arrays, as `Explanation.to_dict` gives them.
    report: gets the figures, line by line.

    Raises UserError, before the model runs where that can be known, for anything that is not there or cannot be
    written.
    """
    if detection is not None and point is not None:
        raise UserError("--detection and --point: give one of them")
    for option, number in (("--detection", detection), ("--layer", layer)):
        if number is not None and number < 1:
            raise UserError(f"{option} {number}: numbers start at 1")
    suffix = out.suffix.lower()
    if suffix not in PAGES and not out.is_dir():
        picture_kind(out)
    if suffix in ANIMATED and layer is not None:
        raise UserError(f"--layer {layer}: {out.name} goes across all layers; leave --layer out, or write a .png")
    outputs = {"--out": out, "--json": json_file}
    prepare_files(outputs)
    for option, path in outputs.items():
        if path is not None and path.exists() and image.exists() and path.samefile(image):
            raise UserError(f"{option} {path}: that would replace the image; name another file")
    traced = trace(model, image, threshold)
    explanation: DetectionExplanation | PointExplanation
    explanation = traced.detection((detection or 1) - 1) if point is None else traced.point(*point)
    index = None if layer is None else layer - 1
    if index is not None:
        check_layer(explanation, index)
    for line in summary(explanation):
        report(line)
    if suffix in PAGES:
        save_page(traced, explanation, out, index)
    else:
        explanation.save(out, index)
    if json_file is not None:
        write_json(json_file, explanation.to_dict())
    report(f"written to {out}" + (f" and {json_file}" if json_file else ""))


def parse_point(text: str | None) -> tuple[float, float] | None:
    """(x, y) of "X,Y". Raises UserError for anything else."""
    if text is None:
        return None
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--point {text}: must be X,Y in pixels, such as 120,80") from None
    if not (math.isfinite(x) and math.isfinite(y)):
        raise UserError(f"--point {text}: must be X,Y in pixels, such as 120,80")
    return x, y


def parse_layer(text: str) -> int | None:
    """None of "all", else the number. Raises UserError for anything else."""
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--layer {text}: must be all or a number, from 1") from None


def summary(explanation: Explanation) -> list[str]:
    """The figures of an explanation, for a terminal."""
    lines = [explanation.title]
    if isinstance(explanation, DetectionExplanation):
        shares = explanation.attention_inside_box().tolist()
        for number, (look, share) in enumerate(zip(explanation.looks, shares, strict=True), 1):
            box = ", ".join(f"{side:.0f}" for side in look.box.tolist())
            score = look.scores[explanation.label]
            lines.append(f"layer {number}: score {score:.2f}, box {box}, {share:.1%} of the attention inside")
        x1, y1, x2, y2 = explanation.box.tolist()
        height, width = explanation.image_size
        lines.append(
            f"attention inside the detected box: first decoder layer {shares[0]:.1%}, last {shares[-1]:.1%} "
            f"(the box covers {(x2 - x1) * (y2 - y1) / (width * height):.1%} of the image)"
        )
    elif isinstance(explanation, PointExplanation):
        tokens = zip(explanation.spatial_shapes, explanation.token_centers.tolist(), strict=True)
        lines += [f"level {n}, {w} × {h}: token at {x:.1f}, {y:.1f}" for n, ((h, w), (x, y)) in enumerate(tokens, 1)]
    return lines
