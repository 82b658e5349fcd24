"""Self-contained web pages, with styles, scripts and data embedded; they load no other files."""

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from PIL import Image

from ..draw import PALETTE
from ..masks import HALO, OPACITY, SHADES

_DRAWING = {"PALETTE": PALETTE, "HALO": HALO, "OPACITY": OPACITY, "SHADES": SHADES}  # pages draw as Python does


def render_page(
    name: str,
    title: str,
    data: Any,
    styles: Sequence[str] = (),
    libraries: Sequence[str] = ("masks.js", "labels.js", "charts.js"),
) -> str:
    """Return a page: page.html with a title, styles, scripts and data.

    Args:
        name: Page whose main part is NAME.html and whose script is NAME.js in this folder.
        title: The title as plain text.
        data: Values for the page's script, as JSON can hold them.
        styles: Files in this folder, in addition to style.css.
        libraries: Scripts in this folder that the page's script uses, in addition to elements.js.
    """
    # JSON without "<" cannot end the script element, whatever the class names are.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "TITLE": html.escape(title),
        "STYLE": "\n".join(map(read_asset, ("style.css", *styles))),
        "BODY": read_asset(f"{name}.html"),
        "SCRIPT": "\n".join(map(read_asset, ("elements.js", *libraries, f"{name}.js"))),
        "DATA": text,
    }
    # One pass, so that inserted text cannot contain placeholders.
    return re.sub("__(TITLE|STYLE|BODY|SCRIPT|DATA)__", lambda match: parts[match[1]], read_asset("page.html"))


def embed_page(page: str, height: int = 640) -> str:
    """Return HTML that shows a page inside of another one, such as a notebook; height in pixels."""
    style = "width: 100%; border: 1px solid #ccc; border-radius: 4px"
    return f'<iframe srcdoc="{html.escape(page)}" height="{height}" style="{style}" loading="lazy"></iframe>'


def jpeg_data_uri(image: Image.Image, longest_side: int, quality: int = 85) -> str:
    """Return an image as the data URI of a JPEG, downscaled if a side is longer than `longest_side` pixels."""
    if max(image.size) > longest_side:
        image = image.copy()
        image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def read_asset(name: str) -> str:
    """Return the text of a file in this folder, with the constants of drawings in place of __DRAWING__."""
    text = resources.files("deformable_detr.visualize.web").joinpath(name).read_text(encoding="utf-8")
    return text.replace("__DRAWING__", json.dumps(_DRAWING))
