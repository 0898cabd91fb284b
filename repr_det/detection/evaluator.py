"""Detectron2's COCO evaluation on annotations that were checked and repaired."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n

from repr_det.detection.coco_results import RESULTS, Truth, read_truth, record_dataset
from repr_det.detection.parts import held_out_images


class CocoEvaluator(COCOEvaluator):
    """COCO's metrics; records names of categories and images next to the results.

    Args:
        cfg: of the model; results go to its ``OUTPUT_DIR``.
        dataset: a name.

    Raises:
        UserError: its annotation file is refused.
    """

    def __init__(self, cfg: CfgNode, dataset: str) -> None:
        truth = _truth_of(dataset)
        if (MetadataCatalog.get(dataset).get("evaluator_type") or "").endswith("panoptic_seg"):
            log_first_n(
                logging.WARNING,
                f"Dataset {dataset}: boxes and masks are evaluated, panoptic quality is not.",
                key="message",
                name=f"detectron2.{__name__}",
            )
        with _reading(truth) if truth else nullcontext():
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
            record_dataset(self._output_dir, self._coco_api)
        return results


def _truth_of(dataset: str) -> Truth | None:
    """The checked annotations of a dataset; None where it has no COCO-format file."""
    # Its file is known only then.
    images = held_out_images(dataset)
    metadata = MetadataCatalog.get(dataset)
    if metadata.get("evaluator_type") != "coco" or not metadata.get("json_file"):
        return None
    return read_truth(metadata.json_file, images)


@contextmanager
def _reading(truth: Truth) -> Iterator[None]:
    """Let COCOEvaluator, which opens its file itself, find these annotations."""
    before, coco_evaluation.COCO = coco_evaluation.COCO, lambda path: truth
    try:
        yield
    finally:
        coco_evaluation.COCO = before
