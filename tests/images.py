"""One picture in the ways in which image files hold pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

ORIENTATION = 0x0112
"""EXIF's tag."""

UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}
"""What EXIF's orientations ask of whoever shows the stored pixels: 6 is a quarter clockwise."""

_UNDO = {6: 8, 8: 6}


class Written(NamedTuple):
    """A file, and what is to be seen in it: (height, width, 3), RGB."""

    path: Path
    seen: Pixels


def written_in_many_ways(folder: Path, pixels: Pixels) -> list[Written]:
    """Files that show some pixels (height, width, 3), or about those, upright and of that size.

    Greyscale, black and white, a palette, and transparency, which is to be overlooked; and JPEGs
    that are stored turned and mirrored, with EXIF's orientation.
    """
    image, found = Image.fromarray(pixels), []

    def add(name: str, stored: Image.Image, seen: Pixels, **options: object) -> None:
        stored.save(folder / name, **options)
        found.append(Written(folder / name, seen))

    grey = pixels[..., 1]
    light = grey > np.median(grey)
    few = image.quantize(16)
    looked_up = np.array(few.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(few)]
    alpha = np.resize(np.arange(256, dtype=np.uint8), grey.shape)
    add("grey.png", Image.fromarray(grey), np.dstack([grey] * 3))
    add("black_and_white.png", Image.fromarray(light), np.dstack([light * np.uint8(255)] * 3))
    add("palette.png", few, looked_up)
    add("palette_with_a_hole.png", few, looked_up, transparency=3)
    add("transparent.png", Image.fromarray(np.dstack([pixels, alpha])), pixels)
    add(
        "grey_and_transparent.png", Image.fromarray(np.dstack([grey, alpha])), np.dstack([grey] * 3)
    )
    for number, upright in UPRIGHT.items():
        stored = Image.fromarray(UPRIGHT[_UNDO.get(number, number)](pixels).copy())
        exif = Image.Exif()
        exif[ORIENTATION] = number
        path = folder / f"turned_{number}.jpg"
        stored.save(path, exif=exif, quality=95)
        with Image.open(path) as opened:
            found.append(Written(path, upright(np.asarray(opened)).copy()))
    return found
