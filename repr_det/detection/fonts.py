"""Fonts that have the characters of a text, for Pillow and for matplotlib."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageDraw, ImageFont

logger = logging.getLogger(f"detectron2.{__name__}")

DEJAVU = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
"""What comes with matplotlib: Latin, Greek, Cyrillic, Arabic, Hebrew and more."""

_UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")
"""Unicode's categories of characters that need no picture."""


def printable(text: str) -> str:
    """A text in one line, letters and their accents joined where there is one character."""
    return " ".join(unicodedata.normalize("NFC", text).split())


class Line:
    """A line of text that is to be drawn with Pillow, each part in a font that has it.

    Args:
        text: what is to be written.
        size: of the letters, in pixels.
    """

    def __init__(self, text: str, size: float) -> None:
        self._parts = [(part, _font(file, size)) for part, file in runs(printable(text))]
        boxes = [font.getbbox(part, anchor="ls") for part, font in self._parts]
        self._ascent = max((-top for _, top, _, _ in boxes), default=0)
        self.height: float = self._ascent + max((bottom for *_, bottom in boxes), default=0)
        self.width: float = sum(font.getlength(part) for part, font in self._parts)

    def draw(self, pen: ImageDraw.ImageDraw, x: float, y: float, fill: str) -> None:
        """Draw the line, its upper left corner at x and y."""
        for part, font in self._parts:
            pen.text((x, y + self._ascent), part, font=font, fill=fill, anchor="ls")
            x += font.getlength(part)


def runs(text: str) -> list[tuple[str, str]]:
    """Parts of a text, each with a font file that has its characters.

    That is :data:`DEJAVU` where possible, else the first font of the system that has a character.
    Warns once of characters that no installed font has.
    """
    missing = frozenset(c for c in text if _file_of(c) is None)
    if missing:
        _warn(missing)
    files = groupby(text, key=lambda character: _file_of(character) or DEJAVU)
    return [("".join(part), file) for file, part in files]


def families(texts: Iterable[str]) -> list[str]:
    """Names of fonts that have the characters of some texts, in matplotlib's order of trial."""
    names = ["DejaVu Sans"]
    for text in texts:
        for _, file in runs(text):
            if file != DEJAVU:
                font_manager.fontManager.addfont(file)
                names.append(FT2Font(file).family_name)
    return list(dict.fromkeys(names))


@lru_cache(maxsize=64)
def _font(file: str, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


@lru_cache(maxsize=4096)
def _file_of(character: str) -> str | None:
    """A font file that has a character; None where there is none."""
    if unicodedata.category(character) in _UNSEEN or character in _characters(DEJAVU):
        return DEJAVU
    return next((file for file in _installed() if character in _characters(file)), None)


@lru_cache(maxsize=1024)
def _warn(characters: frozenset[str]) -> None:
    logger.warning(
        f"No installed font has the characters {''.join(sorted(characters))}: they are drawn as "
        f"boxes. Install one that does, for example Noto Sans CJK."
    )


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
