"""What runs are judged by: accuracy of classifiers, COCO's AP of detectors."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.tables import ACCURACY, AP, ERROR

Record = dict[str, Any]


class Column(NamedTuple):
    """A number that tables compare.

    Attributes:
        name: in a record's evaluations.
        label: heading of the number itself.
        gain: heading of its gain over standard training.
    """

    name: str
    label: str
    gain: str


@dataclass(frozen=True)
class Measure:
    """How the runs of a task are evaluated.

    Attributes:
        metrics: what a record keeps of an evaluation, as its name in ``metrics.json`` by its name
            in the record.
        columns: what tables compare; a run's progress shows the first.
        last: a run's value is the mean of so many last evaluations, the last one alone where there
            are fewer.
        undefined: recorded for a number that is not finite.
        printed: how a run's value is told, a format.
        axis: of figures.
        caption: what a table's numbers are, a sentence without its end.
        compared: what a gain is a difference of.
    """

    metrics: dict[str, str]
    columns: tuple[Column, ...]
    last: int
    undefined: float | None
    printed: str
    axis: str
    caption: str
    compared: str

    def value(self, record: Record, name: str | None = None) -> float | None:
        """A run's number, of its last test set; None for a run that diverged.

        Args:
            record: the run's.
            name: of a column, by default the first.
        """
        if "diverged" in record:
            return None
        name = name or self.columns[0].name
        evaluations = list(record["evaluations"].values())[-1]
        last = evaluations[-self.last :] if len(evaluations) >= self.last else evaluations[-1:]
        return statistics.fmean(entry[name] for entry in last)


_LAST = 5
_CLASSIFICATION = Measure(
    metrics={name: f"accuracy/{name}" for name in ("top1", "top5", "loss")},
    columns=(Column("top1", "Ours", "Our gain"),),
    last=_LAST,
    undefined=None,
    printed="top-1 {:.2f} %",
    axis="top-1 accuracy, %",
    caption=(
        f"Ours: the mean of a run's last {_LAST} evaluations (the last one where there are fewer)"
    ),
    compared="accuracy",
)
_DETECTION = Measure(
    metrics={
        f"{prefix}{name}": f"{kind}/{name}"
        for prefix, kind in (("", "bbox"), ("mask_", "segm"))
        for name in ("AP", "AP50", "AP75")
    },
    columns=(Column("AP", "AP", "Gain in AP"), Column("AP50", "AP50", "Gain in AP50")),
    last=1,
    # Detectron2 writes NaN where a network detects nothing at all.
    undefined=0.0,
    printed="AP {:.2f}",
    axis="AP of boxes, %",
    caption="COCO's AP and AP50 of boxes in % at a run's last evaluation",
    compared="AP",
)

MEASURES: dict[str, Measure] = {
    ACCURACY: _CLASSIFICATION,
    ERROR: _CLASSIFICATION,
    AP: _DETECTION,
}
"""By :attr:`experiments.tables.Table.metric`."""
