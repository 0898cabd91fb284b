"""The metrics of both tasks."""

from __future__ import annotations

import math

from repr_det.classification.metrics import CLASSIFICATION_METRICS
from repr_det.detection.metrics import DETECTION_METRICS
from repr_det.engine.metrics import Metric
from repr_det.tasks import CLASSIFICATION, DETECTION

METRICS: dict[str, tuple[Metric, ...]] = {
    DETECTION: DETECTION_METRICS,
    CLASSIFICATION: CLASSIFICATION_METRICS,
}
"""By task, the best known first."""

MAIN = {task: metrics[0].name for task, metrics in METRICS.items()}
"""By task, the metric that a run is judged by."""

BY_NAME = {metric.name: metric for metrics in METRICS.values() for metric in metrics}

KINDS = tuple(dict.fromkeys(name.partition("/")[0] for name in BY_NAME))
"""The part before the slash in names of evaluated metrics, those of single classes included."""


def counted(name: str, value: float) -> float | None:
    """The value that a report uses; None for one that does not count.

    Args:
        name: of the metric, with or without a test set before it.
        value: as the evaluation wrote it, NaN included.
    """
    if math.isfinite(value):
        return value
    metric = BY_NAME.get("/".join(name.split("/")[-2:]))
    return None if metric is None else metric.undefined
