"""Checks masks of COCO's format, since pycocotools reads outside its memory for damaged ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from repr_det.errors import shown

FURTHEST = 1_000_000
"""In pixels. A larger number is no place in an image."""

NO_MASK = "has no mask. Set a segmentation."
"""What :func:`mask_fault` says where there is none."""


def are_pixels(values: Sequence[Any], furthest: float = FURTHEST) -> bool:
    """Whether all are numbers (no truth values, no NaN) that may be places or sizes in an image."""
    return all(
        (type(value) is float or type(value) is int) and -furthest <= value <= furthest
        for value in values
    )


def mask_fault(segmentation: Any, height: int, width: int) -> str | None:
    """What is wrong with a mask: the end of a sentence, and what to set; None for a sound one.

    Args:
        segmentation: polygons of three points or more, or RLE, compressed or not.
        height: of the image, in pixels.
        width: of the image, in pixels.
    """
    if segmentation is None or segmentation == []:
        return NO_MASK
    if type(segmentation) is dict:
        return rle_fault(segmentation, height, width)
    if type(segmentation) is not list:
        return f"has the segmentation {shown(segmentation)}. Set polygons or RLE."
    reach = 10 * max(height, width)
    for polygon in segmentation:
        if type(polygon) is not list or len(polygon) < 6 or len(polygon) % 2:
            return (
                f"has the polygon {shown(polygon)}. Set lists of x, y, x, y and so on, with three "
                f"points or more."
            )
        if not are_pixels(polygon, reach):
            return f"has the polygon {shown(polygon)}. Set numbers in pixels of its image."
    return None


def rle_fault(rle: dict[str, Any], height: int, width: int) -> str | None:
    """What is wrong with a mask in RLE; see :func:`mask_fault`."""
    size, counts = rle.get("size"), rle.get("counts")
    if type(size) is not list or size != [height, width] or not are_pixels(size):
        return (
            f"has a mask of size {shown(size)}, but its image has [{height}, {width}], height and "
            f"width. Set that of the image."
        )
    if type(counts) is str:
        counts = decoded_counts(counts)
    if (
        type(counts) is not list
        or not all(type(count) is int and count >= 0 for count in counts)
        or sum(counts) != height * width
    ):
        return (
            f"has a mask in RLE whose counts are damaged or cut off ({shown(rle.get('counts'))}). "
            f"Set counts that add up to height times width."
        )
    return None


def decoded_counts(text: str) -> list[int] | None:
    """The counts of compressed RLE, as COCO's ``rleFrString`` reads them; None for other text.

    A number is written in groups of 5 bits, lowest first. A character is 48 and the group, and 32
    where another group follows; the last group's 16 is the sign. From the fourth number on, the
    difference to the last but one is written.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text.encode(errors="replace"):
        group = character - 48
        if not 0 <= group < 64 or shift > 30:
            return None
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            if group & 16:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    return None if shift else counts
