"""Self-contained web pages: a template with styles, scripts and data inside; they load nothing from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from PIL import Image


def fill(package: str, template: str, title: str, data: Any, styles: Sequence[str], scripts: Sequence[str]) -> str:
    """The template with its __TITLE__, __STYLE__, __SCRIPT__ and __DATA__.

    package: such as "deformable_detr.explain", whose files `template`, `styles` and `scripts` name; data: what
    JSON can hold, for a script element.
    """
    # Inside a script element only "</" and "<!--" mean anything; without "<" neither can come from a class's name.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "TITLE": html.escape(title),
        "STYLE": "\n".join(_asset(package, name) for name in styles),
        "SCRIPT": "\n".join(_asset(package, name) for name in scripts),
        "DATA": text,
    }
    # In one pass: nothing that is put in is taken for a placeholder.
    return re.sub("__(TITLE|STYLE|SCRIPT|DATA)__", lambda place: parts[place[1]], _asset(package, template))


def picture(image: Image.Image, longest_side: int, quality: int = 85) -> str:
    """The image, made smaller where a side is longer, as a data URI of a JPEG."""
    if max(image.size) > longest_side:
        image = image.copy()
        image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _asset(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")
