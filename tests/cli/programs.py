"""The programs in this process, by their exit status."""

from __future__ import annotations

from typing import Any

from repr_det.cli import main
from tests.tools.loading import load_tool


def program(name: str, *arguments: Any) -> int:
    """The exit status of a sub-command of ``repr-det``, or of ``compare``."""
    words = list(map(str, arguments))
    try:
        if name == "compare":
            return load_tool("compare_coco").main(words)
        return main([name, *words])
    except SystemExit as stop:
        return stop.code
