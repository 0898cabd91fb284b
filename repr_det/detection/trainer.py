"""The trainer for detection and instance segmentation."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import HookBase

from repr_det.detection.builtin import register_builtin
from repr_det.detection.datasets import (
    check_annotations,
    check_classes,
    check_dataset,
    check_images,
    check_metrics,
    check_test_images,
    check_trained_classes,
    check_training_objects,
    uses_of,
)
from repr_det.detection.deterministic_loader import build_deterministic_loader
from repr_det.detection.evaluator import CocoEvaluator
from repr_det.detection.mapper import NamedImages
from repr_det.detection.parts import register_held_out, training_records
from repr_det.engine.class_names import ClassNames
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
        UserError: datasets that are not there or do not fit the model, and what
            :class:`RePrTrainer` refuses.
    """

    @classmethod
    def check(cls, cfg: CfgNode) -> None:
        """Refuse test sets that are not there; registers datasets that the config implies."""
        register_builtin()
        register_held_out(cfg)
        own_metrics = cls.build_evaluator.__func__ is not DetectionTrainer.build_evaluator.__func__
        for name in cfg.DATASETS.TEST:
            check_dataset(name, uses_of(cfg))
            if not own_metrics:
                check_metrics(name)

    @classmethod
    def check_to_train(cls, cfg: CfgNode) -> None:
        """Refuse datasets that are not there."""
        cls.check(cfg)
        for name in cfg.DATASETS.TRAIN:
            check_dataset(name, uses_of(cfg))

    @classmethod
    def check_to_evaluate(cls, cfg: CfgNode, weights: str) -> None:
        """Refuse test sets that do not fit the model, by classes and annotations; reads them."""
        cls.check(cfg)
        check_annotations(cfg, cfg.DATASETS.TEST)
        check_classes(cfg, cfg.DATASETS.TEST)
        check_trained_classes(weights, cfg.DATASETS.TEST)
        check_test_images(cfg)

    @classmethod
    def training_images(cls, cfg: CfgNode) -> int:
        """How many images a config trains on; reads the annotations."""
        return len(training_records(cfg))

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Detectron2's training loader, or with ``cfg.DETERMINISTIC`` its counterpart."""
        if cfg.DATALOADER.SAMPLER_TRAIN not in _SAMPLERS:
            raise UserError(
                f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN!r}. Set it to one of "
                f"{', '.join(_SAMPLERS)}."
            )
        records = training_records(cfg)  # sets the names of keypoints, which DatasetMapper needs
        resized = any(side > 0 for side in cfg.INPUT.MIN_SIZE_TRAIN)
        mapper = NamedImages(
            DatasetMapper(cfg, is_train=True),
            skip=cfg.INPUT.SKIP_BAD_IMAGES,
            longest=cfg.INPUT.MAX_SIZE_TRAIN if resized else None,
            images=len({record["file_name"] for record in records}),
        )
        check_annotations(cfg, cfg.DATASETS.TEST)
        check_classes(cfg, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
        check_training_objects(cfg, records)
        check_test_images(cfg)
        if not cfg.INPUT.SKIP_BAD_IMAGES:
            check_images(" and ".join(cfg.DATASETS.TRAIN), [r["file_name"] for r in records])
        if cfg.DETERMINISTIC:
            return build_deterministic_loader(cfg, records, mapper)
        return build_detection_train_loader(cfg, mapper=mapper, dataset=records)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Detectron2's test loader; an image that cannot be read is named."""
        own = cfg.clone()
        own.defrost()
        # With keypoints DatasetMapper asks for the training set, to mirror them. That is not done
        # here, and the training set may be on another machine.
        own.MODEL.KEYPOINT_ON = False
        mapper = NamedImages(
            DatasetMapper(own, is_train=False),
            skip=False,
            longest=cfg.INPUT.MAX_SIZE_TEST if cfg.INPUT.MIN_SIZE_TEST else None,
        )
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> CocoEvaluator:
        """COCO's metrics for what the model predicts; predictions go to ``OUTPUT_DIR``."""
        return CocoEvaluator(cfg, dataset_name)

    def build_hooks(self) -> list[HookBase]:
        """The hooks of every task, and one that records the names of the classes."""
        train = self.cfg.DATASETS.TRAIN[0]
        names = MetadataCatalog.get(train).get("thing_classes")
        return [ClassNames(f"Dataset {train}", names), *super().build_hooks()]
