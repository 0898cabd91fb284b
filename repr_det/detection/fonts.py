"""Fonts that have the characters of a text, for Pillow and for matplotlib."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

logger = logging.getLogger(f"detectron2.{__name__}")

DEJAVU = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
"""What comes with matplotlib: Latin, Greek, Cyrillic, Arabic, Hebrew and more."""

_UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")
"""Unicode's categories of characters that need no picture."""


def printable(text: str) -> str:
    """A text in one line, letters and their accents joined where there is one character."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def font_for(text: str, size: float) -> ImageFont.FreeTypeFont:
    """A font to write a text with; see :func:`font_file`.

    Args:
        text: to be written.
        size: in pixels.
    """
    return _font(font_file(text), size)


def font_file(text: str) -> str:
    """The font file that has the most characters of a text, :data:`DEJAVU` where it has them all.

    Warns once of characters that no installed font has.
    """
    return _file_for(_seen(text))


def families(texts: Iterable[str]) -> list[str]:
    """Names of fonts that have the characters of some texts, in matplotlib's order of trial."""
    names = ["DejaVu Sans"]
    for text in texts:
        file = font_file(text)
        if file != DEJAVU:
            font_manager.fontManager.addfont(file)
            names.append(FT2Font(file).family_name)
    return list(dict.fromkeys(names))


def _seen(text: str) -> frozenset[str]:
    return frozenset(c for c in text if unicodedata.category(c) not in _UNSEEN)


@lru_cache(maxsize=64)
def _font(file: str, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


@lru_cache(maxsize=1024)
def _file_for(characters: frozenset[str]) -> str:
    missing = {DEJAVU: characters - _characters(DEJAVU)}
    if missing[DEJAVU]:
        missing |= {file: characters - _characters(file) for file in _installed()}
    best = min(missing, key=lambda file: len(missing[file]))
    if missing[best]:
        logger.warning(
            f"No installed font has the characters {''.join(sorted(missing[best]))}: they are "
            f"drawn as boxes. Install one that does, for example Noto Sans CJK."
        )
    return best


@lru_cache(maxsize=1)
def _installed() -> list[str]:
    """The system's fonts, upright ones of normal weight first."""
    files = font_manager.findSystemFonts()
    slanted = ("bold", "italic", "oblique", "black", "light", "thin", "mono")
    return sorted(files, key=lambda f: (any(word in Path(f).stem.lower() for word in slanted), f))


@lru_cache(maxsize=1024)
def _characters(file: str) -> frozenset[str]:
    """Characters that a font can draw at any size; none for a file that cannot be used."""
    try:
        font = FT2Font(file)
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except (OSError, RuntimeError):
        return frozenset()
