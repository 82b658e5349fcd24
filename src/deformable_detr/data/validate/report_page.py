"""The report of a check as one self-contained HTML page with images of the suspicious boxes."""

import os
import warnings
from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from ...utils.errors import UserError
from ...utils.images import read_image
from ...visualize.web.html import jpeg_data_uri, read_asset
from ..issues import ISSUE_TYPES, SEVERITIES, Issue
from . import Report
from .annotations import Split
from .classes import class_counts

MAX_LINES = 100  # per type
MAX_IMAGES = 12  # per type
MAX_CLASSES = 40  # per split
SIDES = (8, 16, 32, 64, 128, 256, 512)  # pixels; bounds between the bars of box sizes
LONGEST_SIDE = 440  # of an image, in pixels

Box = tuple[float, ...]


def render_report(report: Report) -> str:
    """Return the report as HTML."""
    groups = report.issues.by_code()
    boxes = _boxes_by_path(report)
    tiles = "".join(
        f'<div class="tile {severity}"><b>{len(report.issues.of(severity))}</b><span>{severity}s</span></div>'
        for severity in SEVERITIES
    )
    verdict = "Training cannot use this dataset yet." if report.errors else "Training can use this dataset."
    links = "".join(f'<a href="#{code}">{code} ({len(group)})</a>' for code, group in groups.items())
    links = f'{links or "No issues found."}<a href="#classes">Classes and box sizes</a>'
    title = f"Check of {escape(report.root.name)}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{read_asset('style.css')}</style></head><body>"
        f"<header><h1>{title}</h1><p>{escape(report.summary)}.</p><p><b>{verdict}</b></p></header>"
        f'<nav aria-label="Sections">{links}</nav><main><div class="tiles">{tiles}</div>'
        f"{''.join(_section(code, group, boxes) for code, group in groups.items())}"
        f'<section id="classes"><h2>Classes and box sizes</h2>{"".join(map(_overview, report.splits))}</section>'
        "</main></body></html>\n"
    )


def _section(code: str, group: list[Issue], boxes: dict[Path, list[Box]]) -> str:
    issue_type = ISSUE_TYPES[code]
    figures = "".join(_figure(issue, boxes) for issue in _with_images(group))
    lines = "".join(f"<li>{_breakable(issue.line)}</li>" for issue in group[:MAX_LINES])
    more = f"<li>{len(group) - MAX_LINES} more</li>" if len(group) > MAX_LINES else ""
    is_open = " open" if not figures and issue_type.severity != "note" else ""
    return (
        f'<section id="{code}"><h2><span class="{issue_type.severity}">{issue_type.severity}</span> {code} '
        f"({len(group)})</h2><p>{escape(issue_type.meaning)}. <b>Fix:</b> {escape(issue_type.hint)}.</p>"
        f'<div class="gallery">{figures}</div>'
        f"<details{is_open}><summary>All {len(group)}</summary><ol>{lines}{more}</ol></details></section>"
    )


def _with_images(group: list[Issue]) -> list[Issue]:
    """Return the first issues with an image, each image once."""
    by_image: dict[Path, Issue] = {}
    for issue in group:
        if issue.image is not None and issue.code != "image-unreadable":
            by_image.setdefault(issue.image, issue)
    return list(by_image.values())[:MAX_IMAGES]


def _figure(issue: Issue, boxes: dict[Path, list[Box]]) -> str:
    assert issue.image is not None
    drawings = _draw(issue.image, boxes.get(issue.image, []), issue.box)
    drawings += _draw(issue.other, [], None) if issue.other is not None else ""
    if not drawings:
        return ""
    caption = f"<b>{escape(issue.image.name)}</b> {_breakable(f'{issue.record} {issue.message}')}"
    return f"<figure>{drawings}<figcaption>{caption}</figcaption></figure>"


def _draw(path: Path, others: list[Box], suspect: Box | None) -> str:
    """Return the image as SVG with thin boxes and a thick suspect, which can lie outside the image."""
    try:
        with warnings.catch_warnings(action="ignore"):
            image = Image.fromarray(read_image(path).permute(1, 2, 0).numpy())
    except UserError:  # an issue of its own
        return ""
    scale = min(1.0, LONGEST_SIDE / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    left, top, right, bottom = 0.0, 0.0, float(width), float(height)
    rectangles = "".join(_rectangle([value * scale for value in box], "other") for box in others)
    if suspect is not None:
        x, y, w, h = (value * scale for value in suspect)
        # Boxes outside the image are clipped at half an image beyond its border.
        x0, x1 = (min(max(value, -width / 2), 1.5 * width) for value in sorted((x, x + w)))
        y0, y1 = (min(max(value, -height / 2), 1.5 * height) for value in sorted((y, y + h)))
        rectangles += _rectangle([x0, y0, max(x1 - x0, 3.0), max(y1 - y0, 3.0)], "suspect")
        left, top, right, bottom = min(left, x0 - 4), min(top, y0 - 4), max(right, x1 + 4), max(bottom, y1 + 4)
    data_uri = jpeg_data_uri(image, LONGEST_SIDE, quality=80)
    return (
        f'<svg viewBox="{left:.1f} {top:.1f} {right - left:.1f} {bottom - top:.1f}" role="img" '
        f'aria-label="{escape(path.name, quote=True)}">'
        f'<image href="{data_uri}" width="{width}" height="{height}"/>{rectangles}</svg>'
    )


def _rectangle(box: list[float], kind: str) -> str:
    x, y, w, h = box
    return f'<rect class="box {kind}" x="{x:.1f}" y="{y:.1f}" width="{max(w, 0):.1f}" height="{max(h, 0):.1f}"/>'


def _boxes_by_path(report: Report) -> dict[Path, list[Box]]:
    """Return the xywh boxes of the images that have issues."""
    paths = {issue.image for issue in report.issues if issue.image is not None}
    boxes: dict[Path, list[Box]] = {}
    for split in report.splits:
        for index, box in zip(split.image_indices.tolist(), split.boxes.tolist(), strict=True):
            if (path := split.images[index].path) in paths:
                boxes.setdefault(path, []).append(tuple(box))
    return boxes


def _overview(split: Split) -> str:
    """Return bars of the objects per class and per box size of a split."""
    labels, images = split.category_ids[~split.crowds], split.image_indices[~split.crowds]
    rows = []
    for category_id, count in sorted(class_counts(split).items(), key=lambda item: -item[1])[:MAX_CLASSES]:
        in_images = len(np.unique(images[labels == category_id]))
        rows.append((split.categories[category_id], count, f"{count} in {in_images} image{'s' * (in_images != 1)}"))
    others = len(split.categories) - len(rows)
    more = f"<p>… and {others} more classes</p>" if others else ""
    extents = split.boxes[~split.crowds, 2:].clip(min=0)
    sides = np.sqrt(extents.prod(axis=1))
    counts = np.bincount(np.searchsorted(SIDES, sides, side="right"), minlength=len(SIDES) + 1).tolist()
    names = [f"under {SIDES[0]}", *(f"{a} to {b}" for a, b in pairwise(SIDES)), f"{SIDES[-1]} and more"]
    median = f", median {np.median(sides):.0f}" if len(sides) else ""
    sizes = [(name, count, str(count)) for name, count in zip(names, counts, strict=True)]
    return (
        f"<h3>{escape(split.name)}: {len(split.images)} images, {len(split.positions)} objects</h3>"
        f'<div class="pair"><div><p>Objects per class</p>{_bars(rows)}{more}</div>'
        f"<div><p>Objects per box size, √(width × height) in pixels{median}</p>{_bars(sizes)}</div></div>"
    )


def _bars(rows: list[tuple[str, int, str]]) -> str:
    """Return horizontal bars of (name, value, text)."""
    largest = max((value for _, value, _ in rows), default=0) or 1
    cells = "".join(
        f'<div>{_breakable(name)}</div><div><div class="bar" style="width:{100 * value / largest:.1f}%;'
        f'background:var(--c0)"></div></div><div class="value">{text}</div>'
        for name, value, text in rows
    )
    return f'<div class="bars" style="grid-template-columns:minmax(0,1fr) 2fr max-content">{cells}</div>'


def _breakable(text: str) -> str:
    """Escape a text, and allow line breaks inside long paths."""
    return escape(text).replace(os.sep, f"{os.sep}<wbr>").replace("_", "_<wbr>")
