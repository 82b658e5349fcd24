"""Figures of explanations: an overview of the image, then a close-up with sampling points for each layer.

Sampling points have the color (viridis, readable with any color vision) and size of their attention weight and a shape
per level. All close-ups show the same part of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageColor

from ..visualize.draw import save_image
from .viewport import Viewport, panel_aspect

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "P", "v", "X", "*")  # per level, the finest first
BOX, REFERENCE, HALO, VIEW = "#E69F00", "#FFFFFF", "#111111", "#56B4E9"  # Okabe and Ito's orange and sky blue
INK, GRAY, OUTSIDE = "#1A1A1A", "#4D4D4D", "#D9D9D9"
COLORMAP = "viridis"
DASHED, DOTTED = (0, (4, 2.5)), (0, (1, 1.2))
DPI, FONT_SIZE = 100, 9
PANEL_AREA = 4.4**2  # square inches
MAX_MARKER_AREA = 110.0  # square points, of the largest weight
FRAME_MS, LAST_FRAME_MS = 1000, 2200


class Panel(NamedTuple):
    """Sampling points of one layer, (…, L, P, 2) in pixels, their weights, (…, L, P), and the boxes of its query."""

    caption: str
    locations: np.ndarray
    weights: np.ndarray
    reference_point: np.ndarray
    reference_box: np.ndarray | None = None
    box: np.ndarray | None = None


class Plot(NamedTuple):
    """The content of a figure. font: file of the title's font."""

    image: Image.Image
    title: str
    font: str | None
    spatial_shapes: tuple[tuple[int, int], ...]
    view: Viewport
    max_weight: float
    panels: Sequence[Panel]


def draw(plot: Plot) -> Image.Image:
    """Draw an overview and the panels as an RGB image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    count = 1 + len(plot.panels)
    aspect = panel_aspect(*plot.image.size)
    height = math.sqrt(PANEL_AREA * (1.6 if count == 2 else 1.0) / aspect)
    columns = _column_count(count, aspect)
    rows = math.ceil(count / columns)
    size = (max(columns * (height * aspect + 0.1), 6.6), rows * (height + 0.3) + 2.1)  # inches
    figure = Figure((round(size[0], 2), round(size[1], 2)), DPI, layout="compressed")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    norm = PowerNorm(0.5, 0.0, plot.max_weight)  # weights crowd near zero: the square root spreads them
    _draw_overview(axes[0], plot)
    for panel_axes, panel in zip(axes[1:], plot.panels, strict=False):
        _draw_panel(panel_axes, panel, plot, norm)
    for unused in axes[count:]:
        unused.set_axis_off()
    _add_legend(figure, plot, norm, axes.tolist())
    properties = FontProperties(fname=plot.font, size=FONT_SIZE + 4)
    figure.suptitle(plot.title, x=0.01, ha="left", color=INK, fontproperties=properties, parse_math=False)
    _align_to_pixels(figure, axes[:count].tolist())
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def save_gif(frames: Sequence[Image.Image], path: Path) -> Path:
    """Write images of one size as an animation. Raises UserError if the file cannot be written."""
    from matplotlib import colormaps

    # The palette has the exact colors of weights and lines; the rest is chosen for the first frame.
    shades = (255 * colormaps[COLORMAP](np.linspace(0, 1, 48))[:, :3]).round().astype(int).ravel().tolist()
    inks = [channel for ink in (BOX, REFERENCE, HALO, VIEW, INK, GRAY, OUTSIDE) for channel in ImageColor.getrgb(ink)]
    others = frames[0].quantize(256 - len(shades + inks) // 3, Image.Quantize.MEDIANCUT).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette((shades + inks + others)[: 3 * 256])
    first, *rest = [frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
    durations = [FRAME_MS] * len(rest) + [LAST_FRAME_MS]
    return save_image(first, path, save_all=True, append_images=rest, duration=durations, loop=0)


def _draw_overview(axes: Axes, plot: Plot) -> None:
    width, height = plot.image.size
    _show_image(axes, plot.image, Viewport(0, 0, width, height), f"image of {width} × {height} pixels")
    axes.add_patch(_rectangle(np.clip(plot.view, 0, [width, height] * 2), VIEW, 1.6, DOTTED))
    boxes = [panel.box for panel in plot.panels if panel.box is not None]
    for index, box in enumerate(boxes, 1):
        axes.add_patch(_rectangle(box, BOX, 2.0 if index == len(boxes) else 0.8))
    path = np.stack([panel.reference_point for panel in plot.panels])
    _draw_reference_points(axes, path if boxes else path[:1])


def _draw_panel(axes: Axes, panel: Panel, plot: Plot, norm: Any) -> None:
    outside = float((panel.weights * ~plot.view.contains(panel.locations)).sum() / panel.weights.sum())
    beyond = f", {outside:.0%} beyond" if outside >= 0.005 else ""
    _show_image(axes, plot.image, plot.view, panel.caption + beyond)
    for level in range(panel.weights.shape[-2]):
        weights = panel.weights[..., level, :].ravel()
        order = weights.argsort()  # the heaviest on top
        weights = weights[order]
        points = plot.view.clamp(panel.locations[..., level, :, :].reshape(-1, 2))[order]
        axes.scatter(
            *points.T, s=6 + MAX_MARKER_AREA * weights / plot.max_weight, c=weights, cmap=COLORMAP, norm=norm,
            marker=MARKERS[level % len(MARKERS)], linewidths=0.8, zorder=4,
            edgecolors=np.where(norm(weights) > 0.5, HALO, "#F2F2F2").tolist(),
        )  # fmt: skip
    if panel.reference_box is not None:
        axes.add_patch(_rectangle(panel.reference_box, REFERENCE, 1.4, DASHED))
    if panel.box is not None:
        axes.add_patch(_rectangle(panel.box, BOX, 2.2))
    _draw_reference_points(axes, panel.reference_point[None])


def _show_image(axes: Axes, image: Image.Image, view: Viewport, caption: str) -> None:
    """Show a part of the image, reduced to the resolution of a panel."""
    left, top = max(0, math.floor(view.x1)), max(0, math.floor(view.y1))
    right, bottom = min(image.width, math.ceil(view.x2)), min(image.height, math.ceil(view.y2))
    part = image.crop((left, top, right, bottom))
    part.thumbnail((900, 900), Image.Resampling.LANCZOS)
    axes.imshow(part, extent=(left, right, bottom, top), interpolation="antialiased", zorder=0)
    axes.set(xticks=[], yticks=[], xlim=(view.x1, view.x2), ylim=(view.y2, view.y1), facecolor=OUTSIDE)
    axes.set_title(caption, fontsize=FONT_SIZE, color=GRAY, loc="left")


def _rectangle(box: np.ndarray, color: str, width: float, dash: Any = "solid") -> Any:
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = box.tolist()
    style = {"ec": color, "lw": width, "ls": dash, "path_effects": _halo(width)}
    return Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, zorder=3, **style)


def _halo(width: float) -> list[Any]:
    """A dark outline, with which a line stands out from any background."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=width + 1.6, foreground=HALO)]


def _draw_reference_points(axes: Axes, points: np.ndarray) -> None:
    """Draw crosses joined by a line; the last one is large."""
    axes.plot(*points.T, color=REFERENCE, lw=1.2, zorder=5, path_effects=_halo(1.2))
    sizes = [22] * (len(points) - 1) + [110]
    axes.scatter(*points.T, s=sizes, c=REFERENCE, edgecolors=HALO, linewidths=1.0, marker="P", zorder=6)


def _align_to_pixels(figure: Figure, axes: list[Axes]) -> None:
    """Move axes to whole pixels, without which images are drawn up to a pixel away from their sampling points."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    size = figure.get_size_inches() * DPI
    for one in axes:
        low, high = (np.array(one.get_position().get_points()) * size).round() / size
        one.set_aspect("auto")
        one.set_position((*low, *(high - low)))


def _add_legend(figure: Figure, plot: Plot, norm: Any, axes: list[Axes]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.lines import Line2D

    line: dict[str, Any] = {"lw": 1.8, "path_effects": _halo(1.8)}
    marker: dict[str, Any] = {"ls": "none", "mec": HALO}
    entries = [
        Line2D([], [], label=f"level {n + 1} ({w} × {h})", marker=MARKERS[n % len(MARKERS)], ms=8, mfc="gray", **marker)
        for n, (h, w) in enumerate(plot.spatial_shapes)
    ]
    entries.append(Line2D([], [], label="reference point", marker="P", ms=11, mfc=REFERENCE, **marker))
    if any(panel.reference_box is not None for panel in plot.panels):
        entries.append(Line2D([], [], label="reference box", color=REFERENCE, ls=DASHED, **line))
    if any(panel.box is not None for panel in plot.panels):
        entries.append(Line2D([], [], label="predicted box", color=BOX, **line))
    entries.append(Line2D([], [], label="close-up", color=VIEW, ls=DOTTED, **line))
    columns = 4 if figure.get_figwidth() > 8.5 else 3
    figure.legend(handles=entries, loc="outside lower center", ncols=columns, frameon=False, fontsize=FONT_SIZE)
    bar = figure.colorbar(ScalarMappable(norm, COLORMAP), ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.02)
    bar.set_label("attention weight", fontsize=FONT_SIZE, color=INK)
    ticks = [plot.max_weight * part for part in (0, 1 / 16, 1 / 4, 1)]
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks], fontsize=FONT_SIZE, color=INK)


def _column_count(count: int, aspect: float) -> int:
    """How many panels per row bring the figure close to 16 : 9 with few empty cells."""

    def cost(columns: int) -> float:
        rows = math.ceil(count / columns)
        return abs(math.log(columns * aspect / rows * 9 / 16)) + (rows * columns - count) / count

    return min(range(1, count + 1), key=cost)
