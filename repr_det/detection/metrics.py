"""COCO's metrics as Detectron2 writes them."""

from __future__ import annotations

from repr_det.detection.coco_results import BBOX, METRICS, SEGM
from repr_det.engine.metrics import Metric

SIZES = {"APs": "small", "APm": "medium", "APl": "large"}

# Detectron2 writes NaN for AP, AP50 and AP75 where a network detects nothing at all, which COCO
# counts as 0. By size, NaN means that there are no objects.
DETECTION_METRICS = tuple(
    Metric(f"{kind}/{name}", f"{word} {name}", undefined=None if name in SIZES else 0.0)
    for kind, word in ((BBOX, "box"), (SEGM, "mask"))
    for name in METRICS
)
"""The best known first."""
