"""The trainer of detection and instance segmentation."""

from __future__ import annotations

import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.evaluation import COCOEvaluator

from repr_det.detection.builtin import register_builtin
from repr_det.detection.coco_results import complete
from repr_det.detection.datasets import (
    NamedImages,
    check_classes,
    check_datasets,
    check_test_masks,
    check_training_masks,
)
from repr_det.detection.deterministic_loader import build_deterministic_loader
from repr_det.detection.parts import register_held_out, training_records
from repr_det.engine.trainer import RePrTrainer
from repr_det.errors import UserError

_SAMPLERS = (
    "TrainingSampler",
    "RepeatFactorTrainingSampler",
    "RandomSubsetTrainingSampler",
    "WeightedTrainingSampler",
    "WeightedCategoryTrainingSampler",
)


class DetectionTrainer(RePrTrainer):
    """Detectron2's detection loaders and COCO evaluation, with RePr.

    Args:
        cfg: a config from :func:`repr_det.tasks.get_cfg`.

    Raises:
        UserError: datasets that are not there or do not fit the model, and
            whatever :class:`RePrTrainer` refuses.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.check(cfg)
        super().__init__(cfg)

    @classmethod
    def check(cls, cfg: CfgNode) -> None:
        """Refuse datasets that are not there; registers those that the config implies."""
        register_builtin()
        register_held_out(cfg)
        check_datasets(cfg)

    @classmethod
    def check_to_evaluate(cls, cfg: CfgNode) -> None:
        """Refuse test sets of other classes than the model's, or without its masks; reads them."""
        cls.check(cfg)
        check_classes(cfg, cfg.DATASETS.TEST)
        if cfg.MODEL.MASK_ON:
            check_test_masks(cfg.DATASETS.TEST)

    @classmethod
    def training_images(cls, cfg: CfgNode) -> int:
        """How many images a config trains on; reads the annotations."""
        return len(training_records(cfg))

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Detectron2's training loader, or with ``cfg.DETERMINISTIC`` its counterpart."""
        mapper = NamedImages(DatasetMapper(cfg, is_train=True), skip=cfg.INPUT.SKIP_BAD_IMAGES)
        if cfg.DATALOADER.SAMPLER_TRAIN not in _SAMPLERS:
            raise UserError(
                f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN!r}. Set it to one of "
                f"{', '.join(_SAMPLERS)}."
            )
        records = training_records(cfg)
        if cfg.DETERMINISTIC:
            loader = build_deterministic_loader(cfg, records, mapper)
        else:
            loader = build_detection_train_loader(cfg, mapper=mapper, dataset=records)
        check_classes(cfg, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
        if cfg.MODEL.MASK_ON:
            check_training_masks(cfg, records)
            check_test_masks(cfg.DATASETS.TEST)
        return loader

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Detectron2's test loader; an image that cannot be read is named."""
        mapper = NamedImages(DatasetMapper(cfg, is_train=False), skip=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """COCO's metrics for what the model predicts; predictions go to ``OUTPUT_DIR``."""
        evaluator = COCOEvaluator(
            dataset_name,
            output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"),
            use_fast_impl=_has_fast_evaluation(),
            # What is kept of a held-out part in OUTPUT_DIR may be another config's.
            allow_cached_coco=False,
        )
        complete(evaluator._coco_api)
        return evaluator


def _has_fast_evaluation() -> bool:
    """Whether Detectron2's compiled extension, and so its own COCOeval, is there."""
    try:
        from detectron2 import _C  # noqa: F401
    except ImportError:
        return False
    return True
