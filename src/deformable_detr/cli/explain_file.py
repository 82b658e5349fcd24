"""The work of the command `explain`: explain one image, write the output files and print a summary."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..detector import DeformableDETR
from ..explanation import DetectionExplanation, PointExplanation, trace
from ..explanation.html import save_page
from ..utils.errors import UserError
from ..utils.files import prepare_files, write_json
from ..visualize.draw import image_format

PAGE_SUFFIXES = {".html", ".htm"}


@dataclass(frozen=True)
class ExplainOptions:
    """What to explain and where to write it.

    Attributes:
        out: Output file; its extension selects an image, an animation (.gif) or a web page (.html).
        detection: Number of the detection, from 1. Default: the best.
        point: (x, y) in pixels, instead of a detection.
        layer: Number of the only layer to show, from 1. Default: all.
        threshold: Minimum score of a detection, 0..1.
        json_file: Where to write the arrays of `Explanation.to_dict`, if anywhere.
    """

    out: Path
    detection: int | None = None
    point: tuple[float, float] | None = None
    layer: int | None = None
    threshold: float = 0.5
    json_file: Path | None = None

    def check(self, image: Path) -> None:
        """Raise UserError for wrong options, before the model runs."""
        if self.detection is not None and self.point is not None:
            raise UserError("--detection and --point exclude each other; choose one")
        for option, number in (("--detection", self.detection), ("--layer", self.layer)):
            if number is not None and number < 1:
                raise UserError(f"{option} {number}: numbers start at 1")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold {self.threshold}: must be from 0 to 1")
        if self.out.suffix.lower() not in PAGE_SUFFIXES and not self.out.is_dir():
            image_format(self.out)
        outputs = {"--out": self.out, "--json": self.json_file}
        prepare_files(outputs)
        for option, path in outputs.items():
            if path is not None and path.exists() and image.exists() and path.samefile(image):
                raise UserError(f"{option} {path}: this would overwrite the input image; choose another file")


def explain_file(
    model: DeformableDETR, image: Path, options: ExplainOptions, report: Callable[[str], None] = print
) -> None:
    """Explain a detection or a point of an image, write the output files and report a summary line by line.

    Call `options.check` first.

    Raises:
        UserError: The image cannot be read, there is no such detection or layer, or a file cannot be written.
    """
    traced = trace(model, image, options.threshold)
    explanation: DetectionExplanation | PointExplanation
    explanation = (
        traced.detection((options.detection or 1) - 1) if options.point is None else traced.point(*options.point)
    )
    layer = None if options.layer is None else options.layer - 1
    if layer is not None:
        explanation.check_layer(layer)
    for line in summary(explanation):
        report(line)
    if options.out.suffix.lower() in PAGE_SUFFIXES:
        save_page(traced, explanation, options.out, layer)
    else:
        explanation.save(options.out, layer)
    if options.json_file is not None:
        write_json(options.json_file, explanation.to_dict())
    report(f"wrote {options.out}" + (f" and {options.json_file}" if options.json_file else ""))


def parse_point(text: str | None) -> tuple[float, float] | None:
    """Parse "X,Y". Raises UserError if it is anything else."""
    if text is None:
        return None
    try:
        x, y = (float(part) for part in text.split(","))
        if math.isfinite(x) and math.isfinite(y):
            return x, y
    except ValueError:
        pass
    raise UserError(f"--point {text}: must be X,Y in pixels, such as 120,80")


def parse_layer(text: str) -> int | None:
    """Parse "all" (None) or a number. Raises UserError if it is anything else."""
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--layer {text}: must be all or a number, from 1") from None


def summary(explanation: DetectionExplanation | PointExplanation) -> list[str]:
    """Return the figures of an explanation as lines for a terminal."""
    lines = [explanation.title]
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
