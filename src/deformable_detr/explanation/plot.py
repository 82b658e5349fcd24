"""Explanations as pictures and animations: an overview of the image, and each layer's sampling points close up.

Sampling points are colored by weight in viridis, which rises in brightness and so serves any color vision, sized by
weight, and shaped by level. Every layer is shown over the same part of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageColor

from ..utils.errors import UserError
from ..utils.images import read_image
from .results import DecoderLayerSampling, DetectionExplanation, Explanation, PointExplanation
from .viewport import Viewport, close_up, panel_aspect

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = ("o", "s", "^", "D", "P", "v", "X", "*")  # of the levels, the finest first
BOX, REFERENCE, HALO, VIEW = "#E69F00", "#FFFFFF", "#111111", "#56B4E9"  # Okabe and Ito's orange and sky blue
COLORS = "viridis"
INK, QUIET, PAPER, OUTSIDE = "#1A1A1A", "#4D4D4D", "#FFFFFF", "#D9D9D9"
DPI = 100
TEXT, SMALL = 11, 9  # points
MOST_AREA = 110.0  # of a sampling point's marker, in square points, at the largest weight
PANEL_AREA = 4.4**2  # square inches
FRAME_MS, LAST_FRAME_MS = 1000, 2200
ANIMATED = {".gif": "GIF", ".webp": "WEBP", ".apng": "PNG"}


def draw(explanation: Explanation, layer: int | None = None) -> Image.Image:
    """An RGB picture: an overview and each layer's sampling points, or those of one layer, counted from 0.

    Of a single layer of the encoder, the tokens of the levels have a panel each.
    Raises UserError for a layer that is not there and an image that cannot be read any more.
    """
    if layer is None:
        return _Drawing(explanation).picture(range(len(explanation.layers)), split=False)
    check_layer(explanation, layer)
    return _Drawing(explanation).picture([layer], split=True)


def frames(explanation: Explanation) -> list[Image.Image]:
    """Pictures of one size, a layer each, for an animation."""
    drawing = _Drawing(explanation)
    return [drawing.picture([layer], split=False) for layer in range(len(explanation.layers))]


def save(explanation: Explanation, path: Path, layer: int | None = None) -> Path:
    """Writes `draw`'s picture, or `frames` where the ending is that of an animation and no layer is given.

    Raises UserError for other endings and where the file cannot be written.
    """
    from ..utils.files import replace_file

    kind = picture_kind(path)
    if path.suffix.lower() in ANIMATED and layer is None:
        first, *rest = frames(explanation)
        durations = [FRAME_MS] * len(rest) + [LAST_FRAME_MS]
        options: dict[str, Any] = {"save_all": True, "append_images": rest, "duration": durations, "loop": 0}
        options |= {"quality": 90} if kind == "WEBP" else {}
        if kind == "GIF":
            first, *options["append_images"] = [_with_palette(frame) for frame in (first, *rest)]
    else:
        first = draw(explanation, layer)
        options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: first.save(temporary, kind, **options))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    return path


def _with_palette(frame: Image.Image) -> Image.Image:
    """In 256 colors, as GIF has it: those of weights and lines exactly, the others as the frame needs them."""
    from matplotlib import colormaps

    shades = (255 * colormaps[COLORS](np.linspace(0, 1, 48))[:, :3]).round().astype(np.uint8)
    inks = [ImageColor.getrgb(ink) for ink in (BOX, REFERENCE, HALO, VIEW, INK, QUIET, PAPER, OUTSIDE)]
    fixed = [*shades.reshape(-1).tolist(), *(part for ink in inks for part in ink)]
    others = frame.quantize(256 - len(fixed) // 3, Image.Quantize.MEDIANCUT).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette((fixed + others)[: 3 * 256])
    return frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def picture_kind(path: Path) -> str:
    """Pillow's name of the format that the ending asks for. Raises UserError where there is none."""
    suffix = path.suffix.lower()
    kind = {**Image.registered_extensions(), **ANIMATED}.get(suffix)  # asked for first: it loads what Pillow can save
    if kind is None or kind not in Image.SAVE:
        raise UserError(f"{path}: no picture format has the ending '{path.suffix}'; use .png, .gif, .webp or .html")
    return kind


def check_layer(explanation: Explanation, layer: int) -> None:
    """Raises UserError for a layer, counted from 0, that is not there."""
    count = len(explanation.layers)
    if not 0 <= layer < count:
        part = "encoder" if isinstance(explanation, PointExplanation) else "decoder"
        raise UserError(f"there is no layer {layer + 1}: the {part} has {count}, numbered from 1")


class _Drawing:
    """One explanation and what all its pictures share: the pixels, the view and the scale of the weights."""

    def __init__(self, explanation: Explanation) -> None:
        from matplotlib.colors import PowerNorm

        self.explanation = explanation
        pixels = read_image(explanation.image)
        if tuple(pixels.shape[1:]) != tuple(explanation.image_size):
            raise UserError("the image has changed since it was explained; explain it again")
        self.image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        self.aspect = panel_aspect(*self.image.size)
        # Weights crowd near zero: their square root spreads them over the colors.
        self.heaviest = max(float(look.weights.max()) for look in explanation.layers)
        self.norm = PowerNorm(0.5, vmin=0.0, vmax=self.heaviest)
        self.view = view = close_up(explanation)
        low, high = np.array((view.x1, view.y1)), np.array((view.x2, view.y2))
        self.whole = bool((low <= 0).all() and (high >= self.image.size).all())

    def picture(self, layers: Sequence[int], split: bool) -> Image.Image:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        tokens: list[tuple[int, int | None]] = [(layer, None) for layer in layers]
        if split and isinstance(self.explanation, PointExplanation):
            tokens = [(layer, token) for layer in layers for token in range(len(self.explanation.tokens))]
        count = 1 + len(tokens)
        area = PANEL_AREA * (1.6 if count == 2 else 1.0)
        height = math.sqrt(area / self.aspect)
        width = height * self.aspect
        columns = _columns(count, width, height)
        rows = math.ceil(count / columns)
        caption, head, foot, gap = 0.34, 0.66, 1.5, 0.14  # inches
        whole = (columns * width + (columns + 1) * gap, head + rows * (height + caption) + foot)
        figure = Figure(figsize=(max(whole[0], 6.6), whole[1]), dpi=DPI, facecolor=PAPER)
        canvas = FigureCanvasAgg(figure)
        shift = (figure.get_figwidth() - whole[0]) / 2
        size = (width / figure.get_figwidth(), height / figure.get_figheight())
        for number in range(count):
            row, column = divmod(number, columns)
            left = (shift + gap + column * (width + gap)) / figure.get_figwidth()
            bottom = 1 - (head + (row + 1) * (height + caption)) / figure.get_figheight()
            axes = figure.add_axes((left, bottom, *size))
            if number == 0:
                self._overview(axes, layers)
            else:
                self._panel(axes, *tokens[number - 1])
        _write(figure, gap / figure.get_figwidth(), 1 - 0.16 / figure.get_figheight(), self.explanation)
        what = (
            "inside: attention weight in the detected box; "
            if isinstance(self.explanation, DetectionExplanation)
            else ""
        )
        figure.text(
            gap / figure.get_figwidth(), 1 - 0.52 / figure.get_figheight(),
            f"{what}beyond: weight outside the panel, drawn at its edge", va="center", fontsize=SMALL, color=QUIET,
        )  # fmt: skip
        self._legend(figure)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")

    def _overview(self, axes: Axes, layers: Sequence[int]) -> None:
        from matplotlib.patches import Rectangle

        image, view = self.image, self.view
        width = max(image.width, image.height * self.aspect)
        left, top = (image.width - width) / 2, (image.height - width / self.aspect) / 2
        self._show(axes, Viewport(left, top, left + width, top + width / self.aspect))
        if not self.whole:
            corner = (max(view.x1, left), max(view.y1, top))
            far = (min(view.x2, left + width), min(view.y2, top + width / self.aspect))
            axes.add_patch(
                Rectangle(corner, far[0] - corner[0], far[1] - corner[1], fill=False, ec=VIEW, lw=1.6, ls=(0, (1, 1.2)))
            )
        looks = self.explanation.layers
        if isinstance(self.explanation, DetectionExplanation):
            shown = [looks[layer] for layer in layers]
            for step, look in enumerate(shown, 1):
                assert isinstance(look, DecoderLayerSampling)
                last = step == len(shown)
                _box(axes, look.box.numpy(), BOX, 2.0 if last else 0.8, "solid", 1.0 if last else 0.75)
            _path(axes, np.stack([look.reference_point.numpy() for look in shown]))  # type: ignore[union-attr]
            text = "the box, layer by layer" if len(shown) > 1 else f"the box after layer {layers[0] + 1}"
        else:
            assert isinstance(self.explanation, PointExplanation)
            _path(axes, np.array([self.explanation.point]))
            text = f"image of {image.width} × {image.height} pixels"
        _caption(axes, text)

    def _panel(self, axes: Axes, layer: int, token: int | None) -> None:
        """One layer's points; of the encoder, all tokens' or one's."""
        explanation, view = self.explanation, self.view
        look = explanation.layers[layer]
        self._show(axes, view)
        locations, weights = look.locations.numpy(), look.weights.numpy()
        if token is not None:
            locations, weights = locations[token], weights[token]
        for level in range(weights.shape[-2]):
            points, heavy = locations[..., level, :, :].reshape(-1, 2), weights[..., level, :].reshape(-1)
            order = heavy.argsort()  # the heaviest on top
            points = view.clamp(points)
            bright = self.norm(heavy[order]) > 0.5
            axes.scatter(
                *points[order].T,
                s=6 + MOST_AREA * heavy[order] / self.heaviest,
                c=heavy[order],
                cmap=COLORS,
                norm=self.norm,
                marker=MARKERS[level % len(MARKERS)],
                linewidths=0.8,
                edgecolors=np.where(bright, HALO, "#F2F2F2").tolist(),
                zorder=4,
            )
        text = f"layer {layer + 1}"
        if isinstance(explanation, DetectionExplanation):
            assert isinstance(look, DecoderLayerSampling)
            if look.reference_box is not None:
                _box(axes, look.reference_box.numpy(), REFERENCE, 1.4, (0, (4, 2.5)))
            _box(axes, look.box.numpy(), BOX, 2.2, "solid")
            _path(axes, look.reference_point.numpy()[None])
            share = float(explanation.attention_inside_box()[layer])
            text += f": score {look.scores[explanation.label]:.2f}, {share:.0%} inside"
        else:
            assert isinstance(explanation, PointExplanation)
            centers = explanation.token_centers.numpy()
            _path(axes, np.array([explanation.point]) if token is None else centers[token : token + 1])
            if token is not None:
                h, w = explanation.spatial_shapes[token]
                text += f", from level {token + 1} ({w} × {h})"
        beyond = float((weights * ~view.holds(locations)).sum() / weights.sum())
        if beyond >= 0.005:
            text += f", {beyond:.0%} beyond"
        _caption(axes, text)

    def _show(self, axes: Axes, view: Viewport) -> None:
        """The part of the image, at no more pixels than the panel can show."""
        axes.set_facecolor(OUTSIDE)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_color("#8C8C8C")
        image = self.image
        left, top = max(0, math.floor(view.x1)), max(0, math.floor(view.y1))
        right, bottom = min(image.width, math.ceil(view.x2)), min(image.height, math.ceil(view.y2))
        part = image.crop((left, top, right, bottom))
        part.thumbnail((900, 900), Image.Resampling.LANCZOS)
        axes.imshow(part, extent=(left, right, bottom, top), interpolation="antialiased", zorder=0)
        axes.set(xlim=(view.x1, view.x2), ylim=(view.y2, view.y1), aspect="auto")

    def _legend(self, figure: Any) -> None:
        """Under the panels: what shapes, lines and colors mean."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.lines import Line2D

        def line(label: str, **style: Any) -> Any:
            return Line2D([], [], label=label, **{"linestyle": "none", "markersize": 8, **style})

        gray = {"markerfacecolor": "#7C7B78", "markeredgecolor": HALO}
        entries = [
            line(f"level {number} ({w} × {h})", marker=MARKERS[(number - 1) % len(MARKERS)], **gray)
            for number, (h, w) in enumerate(self.explanation.spatial_shapes, 1)
        ]
        point = {"marker": "P", "markersize": 11, "markerfacecolor": REFERENCE, "markeredgecolor": HALO}
        if isinstance(self.explanation, DetectionExplanation):
            entries.append(line("reference point", **point))
            looks = self.explanation.looks
            if any(look.reference_box is not None for look in looks):
                entries.append(_Outlined([], [], REFERENCE, label="box the layer starts from", ls=(0, (4, 2.5))))
            entries.append(_Outlined([], [], BOX, label="box the layer gives", ls="solid"))
        else:
            entries.append(line("the point", **point))
        if not self.whole:
            entries.append(Line2D([], [], color=VIEW, lw=1.6, ls=(0, (1, 1.2)), label="part shown close up"))
        columns = 4 if figure.get_figwidth() > 8.5 else 3
        figure.legend(
            handles=entries, loc="lower center", ncols=columns, frameon=False, fontsize=SMALL, labelcolor=INK,
            bbox_to_anchor=(0.5, 0.58 / figure.get_figheight()), handlelength=2.2,
        )  # fmt: skip
        width, height = figure.get_figwidth(), figure.get_figheight()
        bar = figure.add_axes((0.5 - 1.6 / width, 0.42 / height, 3.2 / width, 0.11 / height))
        scale = figure.colorbar(ScalarMappable(self.norm, COLORS), cax=bar, orientation="horizontal")
        top = self.heaviest
        scale.set_ticks([0, top / 16, top / 4, top], labels=["0", *(f"{v:.2g}" for v in (top / 16, top / 4, top))])
        scale.ax.tick_params(labelsize=SMALL, labelcolor=INK, length=2)
        figure.text(
            0.5 - 1.7 / width, 0.475 / height, "attention weight",
            ha="right", va="center", fontsize=SMALL, color=INK,
        )  # fmt: skip


def _Outlined(x: Any, y: Any, color: str, **style: Any) -> Any:
    """A line on a dark one, which stands out from any background."""
    from matplotlib import patheffects
    from matplotlib.lines import Line2D

    dark = [patheffects.withStroke(linewidth=style.pop("lw", 1.8) + 2.0, foreground=HALO)]
    return Line2D(x, y, color=color, path_effects=dark, **style)


def _box(axes: Axes, box: np.ndarray, color: str, width: float, dash: Any, alpha: float = 1.0) -> None:
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = box.tolist()
    for ink, extra, style in ((HALO, 1.6, "solid"), (color, 0.0, dash)):
        axes.add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=ink, lw=width + extra, ls=style, alpha=alpha, zorder=3)
        )


def _path(axes: Axes, points: np.ndarray) -> None:
    """Reference points, and the way between them; the last is the large one."""
    axes.plot(*points.T, color=HALO, lw=2.6, zorder=5)
    axes.plot(*points.T, color=REFERENCE, lw=1.2, zorder=5)
    axes.scatter(*points[:-1].T, s=22, c=REFERENCE, edgecolors=HALO, linewidths=0.8, marker="P", zorder=6)
    axes.scatter(*points[-1:].T, s=110, c=REFERENCE, edgecolors=HALO, linewidths=1.1, marker="P", zorder=6)


def _caption(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=SMALL + 0.5, color=QUIET, loc="left", pad=5)


def _write(figure: Any, x: float, y: float, explanation: Explanation) -> None:
    """The heading, in a font that has its letters, a long name shortened to the figure's width."""
    from matplotlib.font_manager import FontProperties

    from ..visualize.fonts import legible

    name, rest, file = "", explanation.title, None
    if isinstance(explanation, DetectionExplanation):
        rest = rest.removeprefix(explanation.name)
        category = int(explanation.detections.category_ids[explanation.index])
        name, file = legible(explanation.name, f"class {category}")
    font = FontProperties(fname=file, size=TEXT + 2)
    room = figure.get_figwidth() * DPI * (1 - 2 * x)
    written = figure.text(x, y, name + rest, va="top", color=INK, fontproperties=font, parse_math=False)
    while name and written.get_window_extent().width > room:
        name = name[: int(len(name) * 0.9)]
        written.set_text(f"{name}…{rest}")


def _columns(count: int, width: float, height: float) -> int:
    """How many panels a row, so that the whole is about as 16 to 9 and few places stay empty."""

    def cost(n: int) -> float:
        rows = math.ceil(count / n)
        return abs(math.log(n * width / (rows * height) * 9 / 16)) + (rows * n - count) / count

    return min(range(1, count + 1), key=cost)
