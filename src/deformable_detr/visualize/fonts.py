"""Names in any script, in a font that has their letters, and something readable where no installed font has them."""

from __future__ import annotations

import logging
import unicodedata
from functools import cache, lru_cache
from pathlib import Path

from PIL import ImageFont

_log = logging.getLogger(__name__)

UPRIGHT = {"regular", "book", "roman", "normal", ""}  # of a font's style


@lru_cache(maxsize=4096)
def legible(text: str, otherwise: str) -> tuple[str, str | None]:
    """What to draw for a text, and the font file for it: DejaVu Sans where that will do; None: Pillow's own font.

    Symbols that the best font lacks, such as emoji, are left out. Where it lacks a letter, or nothing would be left,
    the text is `otherwise`, in Latin letters, and a line is logged: empty boxes would say less.
    """
    text = " ".join(text.split())
    wanted = {ord(letter) for letter in text if _is_drawn(letter)}
    path, known = _best_font(frozenset(wanted | _codes("0123456789.…")))
    missing = wanted - known
    if not missing:
        return text, path
    kept = " ".join("".join(letter for letter in text if ord(letter) in known or letter == " ").split())
    if kept and not any(unicodedata.category(chr(code))[0] in "LMN" for code in missing):
        return kept, path
    _log.warning(
        "no installed font has the letters of “%s”: pictures say “%s”; install one that has, such as Noto Sans (CJK)",
        text,
        otherwise,
    )
    return otherwise, _best_font(frozenset(_codes(otherwise)))[0]


def _codes(text: str) -> set[int]:
    return {ord(letter) for letter in text if not letter.isspace()}


def _is_drawn(letter: str) -> bool:
    """False for spaces, and for the marks that only tell how their neighbors are joined."""
    return unicodedata.category(letter) not in ("Zs", "Cf", "Cc") and not 0xFE00 <= ord(letter) <= 0xFE0F


@lru_cache(maxsize=256)
def _best_font(wanted: frozenset[int]) -> tuple[str | None, frozenset[int]]:
    """The font that has the most of the characters, the first of several, and which it has."""
    best: tuple[str | None, frozenset[int]] = (None, frozenset(range(32, 127)) & wanted)
    most = -1
    for path in _font_files():
        known = _characters(path) & wanted
        if len(known) > most and _is_usable(path):
            best, most = (path, known), len(known)
        if most == len(wanted):
            break
    return best


@cache
def _font_files() -> tuple[str, ...]:
    """DejaVu Sans, which comes with matplotlib, then the installed fonts, sans serif before others."""
    from matplotlib import font_manager

    # Asked for anew in each process: matplotlib's own list does not notice a font that was installed after it was made.
    installed = sorted(
        set(font_manager.findSystemFonts()), key=lambda path: ("sans" not in Path(path).name.lower(), path)
    )
    return (font_manager.findfont("DejaVu Sans"), *installed)


def _rank(path: str) -> tuple[bool, str]:
    return "sans" not in Path(path).name.lower(), path


@cache
def _characters(path: str) -> frozenset[int]:
    """What an upright font of normal weight has; nothing of others."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
        # The font of last resort claims every character and draws a box for it.
        if font.style_name.lower() not in UPRIGHT or font.family_name.startswith("Last Resort"):
            return frozenset()
        return frozenset(font.get_charmap())
    except (OSError, RuntimeError):  # gone since it was listed, or no outlines in it
        return frozenset()


@cache
def _is_usable(path: str) -> bool:
    """Whether Pillow can draw with it, which it cannot with fonts of bitmaps of one size."""
    try:
        ImageFont.truetype(path, 12).getmask("0")
    except (OSError, RuntimeError):
        return False
    return True
