"""Time the optimized model with more images, queries and pixels: the cost should grow with the number of tokens.

python benchmarks/scaling.py --threads 2 --json scaling.json --figure scaling.svg
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import add_model_options, apply_options, finish, option_parser, random_model
from deformable_detr.benchmark import time_interleaved

TOLERANCE = 0.2  # band around the median in the figure
Case = tuple[int, int, int]  # images, queries, short side


@dataclass(frozen=True)
class Row:
    """One input. Tokens are those of the encoder plus queries; `relative` is us_per_token / its median."""

    varied: str
    images: int
    queries: int
    height: int
    width: int
    tokens: int
    median_ms: float
    us_per_token: float
    relative: float


def cases(images: list[int], queries: list[int], sides: list[int]) -> list[tuple[str, Case]]:
    """Return what varies and the case: each quantity alone, the others at their first value."""
    varied = [("images", (count, queries[0], sides[0])) for count in images]
    varied += [("queries", (images[0], count, sides[0])) for count in queries]
    return varied + [("pixels", (images[0], queries[0], side)) for side in sides]


def measure(options: Any) -> list[Row]:
    models = {count: random_model(options, num_queries=count).optimize(options.precision) for count in options.queries}
    all_cases = cases(options.images, options.queries, options.short_side)
    calls, tokens = {}, {}  # a case that several rows share is timed once
    with torch.inference_mode():
        for _, case in all_cases:
            count, queries, side = case
            generator = torch.Generator().manual_seed(0)
            pixels = torch.randn(count, 3, side, side * 4 // 3, generator=generator).to(options.device)
            calls[case] = partial(models[queries], pixels)
            maps, _ = models[queries].features(pixels[:1])
            tokens[case] = count * (sum(x.shape[1] * x.shape[2] for x in maps) + queries)
        timings = time_interleaved(calls, options.repeats)
    costs = {case: timing.median_ms * 1e3 / tokens[case] for case, timing in timings.items()}
    median = statistics.median(costs.values())
    return [
        Row(
            varied, *case, case[2] * 4 // 3, tokens[case], timings[case].median_ms, costs[case], costs[case] / median
        )
        for varied, case in all_cases
    ]  # fmt: skip


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Draw the time per token over images, queries and pixels."""
    from matplotlib.figure import Figure

    median = rows[0].us_per_token / rows[0].relative
    groups = {name: [row for row in rows if row.varied == name] for name in ("images", "queries", "pixels")}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    widths = [max(2, len(group)) for group in groups.values()]
    axes = figure.subplots(1, len(groups), sharey=True, width_ratios=widths)
    for axis, (name, group) in zip(axes, groups.items(), strict=True):
        labels = [f"{row.height}×\n{row.width}" if name == "pixels" else str(getattr(row, name)) for row in group]
        band = (median * (1 - TOLERANCE), median * (1 + TOLERANCE))
        axis.axhspan(*band, color="#4269d0", alpha=0.12, label="median ± 20%")
        axis.axhline(median, color="#4269d0", linewidth=1)
        axis.plot(range(len(group)), [row.us_per_token for row in group], "o-", color="#ff725c", label="measured")
        axis.set_xticks(range(len(group)), labels)
        axis.set_xlabel(name)
    axes[0].set_ylabel("µs per token")
    axes[0].set_ylim(0, max(median * 1.5, *(row.us_per_token * 1.1 for row in rows)))
    axes[0].legend(loc="lower left", frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def main() -> None:
    parser = option_parser(__doc__, repeats=3)
    add_model_options(parser)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--queries", type=int, nargs="+", default=[300, 900])
    parser.add_argument("--short-side", type=int, nargs="+", default=[480, 640, 800, 1200, 1600])
    parser.add_argument("--figure", type=Path, help="SVG or PNG file: time per token")
    options = parser.parse_args()
    apply_options(options)
    rows = measure(options)
    columns = {
        "varied": "", "images": "", "queries": "", "height": "", "width": "", "tokens": "", "median_ms": ".0f",
        "us_per_token": ".1f", "relative": ".2f",
    }  # fmt: skip
    largest = max(abs(row.relative - 1) for row in rows)
    finish(options, rows, columns, preset=options.preset, precision=options.precision, max_deviation=largest)
    print(f"largest deviation from the median: {largest:.0%}")
    if options.figure is not None:
        draw(rows, f"{options.preset}, {options.precision}, {torch.get_num_threads()} threads", options.figure)


if __name__ == "__main__":
    main()
