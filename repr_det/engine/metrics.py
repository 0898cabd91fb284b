"""Describes a number that the evaluation of a task writes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A number of an evaluation.

    Attributes:
        name: in ``metrics.json``, for example ``"bbox/AP"``.
        title: for readers.
        unit: ``"%"`` or empty.
        undefined: the value where the evaluation wrote NaN; None for no value.
    """

    name: str
    title: str
    unit: str = "%"
    undefined: float | None = None
