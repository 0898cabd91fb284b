"""What a task says of a number that its evaluation writes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A number of an evaluation.

    Attributes:
        name: in ``metrics.json``, for example ``"bbox/AP"``.
        title: for readers.
        unit: ``"%"`` or empty.
        undefined: what counts where the evaluation wrote NaN; None where there is no value then.
    """

    name: str
    title: str
    unit: str = "%"
    undefined: float | None = None
