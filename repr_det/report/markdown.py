"""Tables that read well both printed and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def aligned_table(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned as text, too.

    Args:
        cells: rows of equal length, the heading first. The first column is aligned left, the others
            right.
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        f"| {line[0]:<{widths[0]}} | "
        + " | ".join(f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        + " |"
        for line in cells
    ]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])
