"""`deformable-detr benchmark scaling`: whether the cost grows with the tokens and not faster."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..utils.device import pick_device
from ..utils.files import write_json
from .model import random_model
from .rounds import described, in_turn

BATCHES = (1, 2, 4, 8)
QUERIES = (300, 900)
SHORT_SIDES = (480, 640, 800, 1200, 1600)
NEAR = 0.2  # how far a point may lie from the median of all


@dataclass(frozen=True)
class Point:
    """One input. tokens: of the encoder and queries, of all images. us_per_token: microseconds of the median.

    relative: to the median of all points.
    """

    varied: str
    batch: int
    queries: int
    height: int
    width: int
    tokens: int
    median_ms: float
    p95_ms: float
    us_per_token: float
    relative: float


def cases(
    batches: Sequence[int], queries: Sequence[int], short_sides: Sequence[int]
) -> list[tuple[str, int, int, tuple[int, int]]]:
    """(what is varied, images, queries, (height, width)): each of the three alone, from its first value on."""
    first = (short_sides[0], short_sides[0] * 4 // 3)
    found = [("images", batch, queries[0], first) for batch in batches]
    found += [("queries", batches[0], count, first) for count in queries]
    return found + [("pixels", batches[0], queries[0], (side, side * 4 // 3)) for side in short_sides]


def measure(
    preset: str,
    precision: str,
    repeats: int,
    device: str = "cpu",
    batches: Sequence[int] = BATCHES,
    queries: Sequence[int] = QUERIES,
    short_sides: Sequence[int] = SHORT_SIDES,
    changes: dict[str, Any] | None = None,
) -> list[Point]:
    """Times the optimized model, random weights, over all cases in turn."""
    models: dict[int, Any] = {}
    for count in queries:
        models[count] = random_model(preset, device, {**(changes or {}), "num_queries": count}).optimize(precision)
    calls: dict[Any, Callable[[], object]] = {}  # a case that is in several rows is timed once
    tokens: dict[Any, int] = {}
    every = cases(batches, queries, short_sides)
    with torch.inference_mode():
        for _, batch, count, size in every:
            key = (batch, count, size)
            pixels = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
            calls[key] = partial(models[count], pixels)
            tokens[key] = batch * (_tokens(models[count], size, device) + count)
        times = in_turn({str(key): call for key, call in calls.items()}, repeats)
    costs = {key: times[str(key)].median_ms * 1e3 / tokens[key] for key in calls}
    middle = statistics.median(costs.values())
    points = []
    for varied, batch, count, size in every:
        key = (batch, count, size)
        found = times[str(key)]
        points.append(
            Point(
                varied, batch, count, *size, tokens[key], found.median_ms, found.p95_ms, costs[key],
                costs[key] / middle,
            )
        )  # fmt: skip
    return points


def _tokens(model: Any, size: tuple[int, int], device: str) -> int:
    return sum(x.shape[1] * x.shape[2] for x in model.features(torch.zeros(1, 3, *size, device=device)))


def run(
    preset: str = "refine",
    precision: str = "fp32",
    threads: int | None = None,
    repeats: int = 3,
    json_path: Path | None = None,
    picture: Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measures, prints a table and writes JSON and picture where asked to. Raises UserError for an unknown device."""
    pick_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    points = measure(preset, precision, repeats, device)
    report = {
        **described(threads, device), "preset": preset, "precision": precision, "repeats": repeats,
        "furthest": max(abs(point.relative - 1) for point in points), "rows": [asdict(point) for point in points],
    }  # fmt: skip
    print(table(points))
    print(f"furthest from the median of all: {report['furthest']:.0%}")
    if json_path is not None:
        write_json(json_path, report)
    if picture is not None:
        draw(points, f"{preset}, {precision}, {report['machine']['name']}, {report['threads']} threads", picture)
    return report


def table(points: Sequence[Point]) -> str:
    """The points as a Markdown table."""
    lines = ["| varied | images | queries | pixels | tokens | median ms | µs a token | of the median |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    lines += [
        f"| {p.varied} | {p.batch} | {p.queries} | {p.height}×{p.width} | {p.tokens} | {p.median_ms:.0f} "
        f"| {p.us_per_token:.1f} | {p.relative:.2f} |"
        for p in points
    ]
    return "\n".join(lines)


def draw(points: Sequence[Point], title: str, path: Path) -> None:
    """Microseconds a token over what is varied, and the band in which they should lie."""
    from matplotlib.figure import Figure

    labels: dict[str, Callable[[Point], str]] = {
        "images": lambda p: str(p.batch),
        "queries": lambda p: str(p.queries),
        "pixels": lambda p: f"{p.height}×\n{p.width}",
    }
    shown = [name for name in labels if any(point.varied == name for point in points)]
    middle = points[0].us_per_token / points[0].relative
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False, width_ratios=[
        max(2, sum(point.varied == name for point in points)) for name in shown
    ])[0]  # fmt: skip
    for axis, name in zip(axes, shown, strict=True):
        some = [point for point in points if point.varied == name]
        places = range(len(some))
        axis.axhspan(middle * (1 - NEAR), middle * (1 + NEAR), color="#4269d0", alpha=0.12, label="median ± 20%")
        axis.axhline(middle, color="#4269d0", linewidth=1)
        axis.plot(places, [point.us_per_token for point in some], "o-", color="#ff725c", label="measured")
        axis.set_xticks(places, [labels[name](point) for point in some])
        axis.set_xlim(-0.5, len(some) - 0.5)
        axis.set_xlabel(name)
    axes[0].set_ylabel("µs a token")
    axes[0].set_ylim(0, max(middle * 1.5, *(point.us_per_token * 1.1 for point in points)))
    axes[0].legend(loc="lower left", frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
