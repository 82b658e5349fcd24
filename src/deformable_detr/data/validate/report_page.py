"""The findings as one HTML page that needs nothing else: what it is, what to do, and pictures of the suspects."""

from __future__ import annotations

import base64
import io
import os
import warnings
from html import escape
from pathlib import Path

from PIL import Image, ImageOps

from . import Report
from .annotations import Split
from .classes import class_counts
from .issues import KINDS, SEVERITIES, Issue

ROWS = 100  # lines of one kind
PICTURES = 12  # suspects of one kind that are shown
SIDE = 440  # long side of a picture in pixels
CLASSES = 40  # bars of a split

Box = tuple[float, float, float, float]


def page(report: Report) -> str:
    """The whole page as text."""
    boxes = _boxes_by_path(report)
    sections = [_section(code, group, boxes) for code, group in report.findings.by_code().items()]
    counts = "".join(
        f'<li class="{severity}"><b>{len(report.findings.of(severity))}</b> {severity}s</li>' for severity in SEVERITIES
    )
    verdict = "Training cannot use this set yet." if report.errors else "Training can use this set."
    nothing = "" if sections else "<p>Nothing was found.</p>"
    links = "".join(
        f'<li><a href="#{code}">{code}</a> {len(group)}</li>' for code, group in report.findings.by_code().items()
    )
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Check of {escape(report.root.name)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>Check of {escape(report.root.name)}</h1><p>{escape(report.summary)}.</p>"
        f'<p class="verdict">{verdict}</p><ul class="counts">{counts}</ul>{nothing}<ul class="kinds">{links}</ul>'
        f"{''.join(sections)}<h2>Classes</h2>{''.join(_classes(split) for split in report.splits)}"
        "</main></body></html>\n"
    )


def _section(code: str, group: list[Issue], boxes: dict[Path, list[Box]]) -> str:
    kind = KINDS[code]
    shown = _shown(group)
    pictures = "".join(_figure(finding, boxes) for finding in shown)
    rows = "".join(f"<li>{_breakable(finding.line)}</li>" for finding in group[:ROWS])
    more = f"<li>{len(group) - ROWS} more</li>" if len(group) > ROWS else ""
    opened = " open" if not shown and kind.severity != "note" else ""
    return (
        f'<section id="{code}"><h2><span class="{kind.severity}">{kind.severity}</span> {code} '
        f"<small>{len(group)}</small></h2><p>{escape(kind.meaning)}. <b>Mend:</b> {escape(_lower(kind.mend))}.</p>"
        f'<div class="pictures">{pictures}</div>'
        f"<details{opened}><summary>All {len(group)}</summary><ol>{rows}{more}</ol></details></section>"
    )


def _shown(group: list[Issue]) -> list[Issue]:
    """The first suspects with a picture each, no picture twice."""
    chosen: dict[Path, Issue] = {}
    for finding in group:
        if finding.image is not None and finding.code != "image-unreadable":
            chosen.setdefault(finding.image, finding)
        if len(chosen) == PICTURES:
            break
    return list(chosen.values())


def _figure(finding: Issue, boxes: dict[Path, list[Box]]) -> str:
    assert finding.image is not None
    shown = _picture(finding.image, boxes.get(finding.image, []), finding.box)
    if finding.other is not None:
        shown += _picture(finding.other, [], None)
    if not shown:
        return ""
    caption = f"<b>{escape(finding.image.name)}</b> {_breakable(f'{finding.record} {finding.what}')}"
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def _picture(path: Path, others: list[Box], suspect: Box | None) -> str:
    """The image as SVG with its boxes thin and the suspect one thick, also where that lies outside the image."""
    loaded = _thumbnail(path)
    if loaded is None:
        return ""
    data, width, height, scale = loaded
    left, top, right, bottom = 0.0, 0.0, float(width), float(height)
    rectangles = "".join(_rectangle([value * scale for value in box], "other") for box in others)
    if suspect is not None:
        x, y, w, h = (value * scale for value in suspect)
        # What lies outside is shown up to half a picture away.
        x0, x1 = (min(max(value, -width / 2), 1.5 * width) for value in sorted((x, x + w)))
        y0, y1 = (min(max(value, -height / 2), 1.5 * height) for value in sorted((y, y + h)))
        rectangles += _rectangle([x0, y0, max(x1 - x0, 3.0), max(y1 - y0, 3.0)], "suspect")
        left, top, right, bottom = min(left, x0 - 4), min(top, y0 - 4), max(right, x1 + 4), max(bottom, y1 + 4)
    return (
        f'<svg viewBox="{left:.1f} {top:.1f} {right - left:.1f} {bottom - top:.1f}" role="img" '
        f'aria-label="{escape(path.name, quote=True)}">'
        f'<image href="data:image/jpeg;base64,{data}" width="{width}" height="{height}"/>{rectangles}</svg>'
    )


def _rectangle(box: list[float], kind: str) -> str:
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return ""
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}"/>'


def _thumbnail(path: Path) -> tuple[str, int, int, float] | None:
    """JPEG in base64, width, height and scale of a small copy, upright; None where the file cannot be shown."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                return None
            upright = ImageOps.exif_transpose(image)
            before = max(upright.size)
            small = upright.convert("RGB")
    except Exception:  # decoders raise whatever they like; that the file is bad is told in words
        return None
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode(), small.width, small.height, max(small.size) / before


def _boxes_by_path(report: Report) -> dict[Path, list[Box]]:
    """The boxes of the pictures that findings show, xywh in pixels."""
    wanted = {finding.image for finding in report.findings if finding.image is not None}
    boxes: dict[Path, list[Box]] = {}
    for split in report.splits:
        index = {k for k, picture in enumerate(split.pictures) if picture.path in wanted}
        for image, box in zip(split.images.tolist(), split.boxes.tolist(), strict=True):
            if image in index:
                boxes.setdefault(split.pictures[image].path, []).append(tuple(box))
    return boxes


def _classes(split: Split) -> str:
    """Bars of how many objects each class has."""
    counts = sorted(class_counts(split).items(), key=lambda item: -item[1])
    most = max((count for _, count in counts), default=0) or 1
    rows = "".join(
        f'<tr><th scope="row">{escape(split.categories[number])}</th><td>{count}</td>'
        f'<td class="bar"><div style="width:{100 * count / most:.1f}%"></div></td></tr>'
        for number, count in counts[:CLASSES]
    )
    more = f"<p>… and {len(counts) - CLASSES} more classes</p>" if len(counts) > CLASSES else ""
    facts = f"{len(split.pictures)} images, {len(split.positions)} objects"
    return f"<h3>{escape(split.name)}: {facts}</h3><table>{rows}</table>{more}"


def _breakable(text: str) -> str:
    """Escaped, with places where a long path may go on in the next line."""
    return escape(text).replace(os.sep, f"{os.sep}<wbr>").replace("_", "_<wbr>")


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


_STYLE = """
:root{color-scheme:light dark;--line:#8886;--error:#c0271d;--warning:#8a5a00;--note:#2560b0;--bar:#3b7dd8}
@media (prefers-color-scheme:dark){:root{--error:#ff8a80;--warning:#ffc04d;--note:#8ab8ff}}
*{box-sizing:border-box}
body{margin:0;font:16px/1.5 system-ui,sans-serif}
main{max-width:72rem;margin:auto;padding:1rem}
h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .3rem}h2 small{font-weight:400}
p{margin:.4rem 0}.verdict{font-weight:600}
ul.counts,ul.kinds{list-style:none;display:flex;flex-wrap:wrap;gap:.5rem 1.2rem;padding:0}
.error{color:var(--error)}.warning{color:var(--warning)}.note{color:var(--note)}
section{border-top:1px solid var(--line)}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(16rem,100%),1fr));gap:1rem;margin:.6rem 0}
figure{margin:0}svg{display:block;width:100%;height:auto;max-height:20rem;background:#8883;margin-bottom:.3rem}
figcaption{font-size:.85rem;overflow-wrap:anywhere}
rect{fill:none;vector-effect:non-scaling-stroke}
rect.other{stroke:#56b4e9;stroke-width:2}
rect.suspect{stroke:#ff2d20;stroke-width:3}
details{margin:.5rem 0}ol{font-size:.9rem;overflow-wrap:anywhere;padding-left:2.2rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th{text-align:left;font-weight:400;width:30%;overflow-wrap:anywhere}td{padding:.1rem .5rem;text-align:right}
td.bar{width:60%}td.bar div{height:.8rem;min-width:1px;background:var(--bar)}
"""
