"""The clock of all benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def now() -> float:
    """Seconds of a steady clock, once a GPU has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable[[], Any]) -> float:
    """How long some work takes."""
    begin = now()
    work()
    return now() - begin
