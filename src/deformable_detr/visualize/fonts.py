"""Fonts for names in any script, with a readable fallback if no installed font has the characters."""

import logging
import unicodedata
from functools import cache, lru_cache
from pathlib import Path

from PIL import ImageFont

_log = logging.getLogger(__name__)

UPRIGHT_STYLES = {"regular", "book", "roman", "normal", ""}


@lru_cache(maxsize=4096)
def legible(text: str, fallback: str) -> tuple[str, str | None]:
    """Return a text that an installed font can draw, and the font file; None is Pillow's default font.

    Symbols that the best font lacks, such as emoji, are removed. If it lacks a letter, or nothing is left, the text is
    `fallback`, in Latin letters, and a warning is logged.
    """
    text = " ".join(text.split())
    needed = {ord(character) for character in text if _is_visible(character)}
    path, available = _best_font(frozenset(needed | _codes("0123456789.…")))
    missing = needed - available
    if not missing:
        return text, path
    kept = " ".join("".join(c for c in text if ord(c) in available or c == " ").split())
    if kept and not any(unicodedata.category(chr(code))[0] in "LMN" for code in missing):
        return kept, path
    _log.warning(
        "no installed font has the letters of “%s”; images show “%s”; install a font such as Noto Sans CJK",
        text,
        fallback,
    )
    return fallback, _best_font(frozenset(_codes(fallback)))[0]


def _codes(text: str) -> set[int]:
    return {ord(character) for character in text if not character.isspace()}


def _is_visible(character: str) -> bool:
    """Return False for spaces and for marks that only join their neighbors."""
    return unicodedata.category(character) not in ("Zs", "Cf", "Cc") and not 0xFE00 <= ord(character) <= 0xFE0F


@lru_cache(maxsize=256)
def _best_font(needed: frozenset[int]) -> tuple[str | None, frozenset[int]]:
    """Return the first font that has the most of the characters, and which of them it has."""
    best: tuple[str | None, frozenset[int]] = (None, frozenset(range(32, 127)) & needed)
    count = -1
    for path in _font_files():
        available = _characters(path) & needed
        if len(available) > count:
            best, count = (path, available), len(available)
        if count == len(needed):
            break
    return best


@cache
def _font_files() -> tuple[str, ...]:
    """Return DejaVu Sans, which matplotlib ships, then the installed fonts, sans serif first."""
    from matplotlib import font_manager

    # matplotlib's cached font list misses fonts that were installed later.
    installed = set(font_manager.findSystemFonts())
    sans_first = sorted(installed, key=lambda path: ("sans" not in Path(path).name.lower(), path))
    return (font_manager.findfont("DejaVu Sans"), *sans_first)


@cache
def _characters(path: str) -> frozenset[int]:
    """Return the characters of an upright font of normal weight that Pillow can draw; none for other fonts."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
        # The Last Resort font draws a box for every character.
        if font.style_name.lower() not in UPRIGHT_STYLES or font.family_name.startswith("Last Resort"):
            return frozenset()
        ImageFont.truetype(path, 12).getmask("0")
        return frozenset(font.get_charmap())
    except (OSError, RuntimeError):  # deleted meanwhile, or a bitmap font
        return frozenset()
