"""What the evaluation of classifiers writes."""

from __future__ import annotations

from repr_det.engine.metrics import Metric

CLASSIFICATION_METRICS = (
    Metric("accuracy/top1", "top-1 accuracy"),
    Metric("accuracy/top5", "top-5 accuracy"),
    Metric("accuracy/loss", "held-out loss", unit=""),
)
"""The best known first."""
