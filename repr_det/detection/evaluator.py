"""Detectron2's COCO evaluation on annotations that were checked and repaired."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.utils import comm

from repr_det.detection.coco_results import RESULTS, Truth, read_truth, record_categories
from repr_det.detection.datasets import is_coco


class CocoEvaluator(COCOEvaluator):
    """COCO's metrics; records the names of the categories next to the results.

    Args:
        cfg: of the model; results go to its ``OUTPUT_DIR``.
        dataset: a name.

    Raises:
        UserError: its annotation file is refused.
    """

    def __init__(self, cfg: CfgNode, dataset: str) -> None:
        metadata = MetadataCatalog.get(dataset)
        has_file = is_coco(metadata) and metadata.get("json_file")
        with _reading(read_truth(metadata.json_file)) if has_file else nullcontext():
            super().__init__(
                dataset,
                output_dir=str(Path(cfg.OUTPUT_DIR, RESULTS.parent)),
                kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
                # A cached held-out part in OUTPUT_DIR may be another config's.
                allow_cached_coco=False,
            )

    def evaluate(self, img_ids: Any = None) -> dict[str, Any]:
        """Detectron2's metrics of what was processed."""
        results = super().evaluate(img_ids)
        if comm.is_main_process() and self._predictions:
            record_categories(self._output_dir, self._coco_api)
        return results


@contextmanager
def _reading(truth: Truth) -> Iterator[None]:
    """Let COCOEvaluator, which opens its file itself, find these annotations."""
    before, coco_evaluation.COCO = coco_evaluation.COCO, lambda path: truth
    try:
        yield
    finally:
        coco_evaluation.COCO = before
