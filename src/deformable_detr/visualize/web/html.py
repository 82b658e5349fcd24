"""Self-contained web pages: a template with its styles, scripts and data embedded; they load no other files."""

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from PIL import Image


def render_page(
    template: str, title: str, data: Any, styles: Sequence[str] = ("style.css",), scripts: Sequence[str] = ()
) -> str:
    """Return a template with __TITLE__, __STYLE__, __SCRIPT__ and __DATA__ filled in.

    Args:
        template, styles, scripts: Files in this folder, such as "report.html".
        title: The title as plain text.
        data: Values for the page's script, as JSON can hold them.
    """
    # JSON without "<" cannot end the script element, whatever the class names are.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "TITLE": html.escape(title),
        "STYLE": "\n".join(read_asset(name) for name in styles),
        "SCRIPT": "\n".join(read_asset(name) for name in scripts),
        "DATA": text,
    }
    # One pass, so that inserted text cannot contain placeholders.
    return re.sub("__(TITLE|STYLE|SCRIPT|DATA)__", lambda name: parts[name[1]], read_asset(template))


def jpeg_data_uri(image: Image.Image, longest_side: int, quality: int = 85) -> str:
    """Return an image as the data URI of a JPEG, downscaled if a side is longer than `longest_side` pixels."""
    if max(image.size) > longest_side:
        image = image.copy()
        image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def read_asset(name: str) -> str:
    """Return the text of a file in this folder."""
    return resources.files("deformable_detr.visualize.web").joinpath(name).read_text(encoding="utf-8")
