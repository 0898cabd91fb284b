"""The programs in this process, by their exit status."""

from __future__ import annotations

from typing import Any

from repr_det.cli import main


def program(name: str, *arguments: Any) -> int:
    """The exit status of a sub-command of ``repr-det``, also of one that ends its process."""
    try:
        return main([name, *map(str, arguments)])
    except SystemExit as stop:
        return stop.code
