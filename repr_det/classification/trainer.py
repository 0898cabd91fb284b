"""The trainer for classification."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from repr_det.classification.datasets import (
    ImageArrays,
    load_images,
    training_images,
    training_set,
)
from repr_det.classification.epochs import resolve_epochs
from repr_det.classification.evaluator import AccuracyEvaluator
from repr_det.classification.loader import (
    ArrayTestLoader,
    ArrayTrainLoader,
    FileTrainLoader,
    Share,
    file_test_loader,
    train_transform,
)
from repr_det.classification.schemes import DenseSparseDenseHook
from repr_det.engine.class_names import ClassNames, check_names, difference, recorded_names
from repr_det.engine.trainer import RePrTrainer
from repr_det.errors import UserError


class ClassificationTrainer(RePrTrainer):
    """RePr's trainer with the data and the evaluation of classification.

    Args:
        cfg: a config with the keys of classification; its keys in epochs are resolved here.

    Raises:
        UserError: a mistake in the config or the data, see
            :func:`repr_det.classification.datasets.load_images`,
            :meth:`repr_det.classification.classifier.ImageClassifier.from_config` and
            :func:`repr_det.classification.epochs.resolve_epochs`.
    """

    LENGTHS = (*RePrTrainer.LENGTHS, "DSD.DENSE_ITERS", "DSD.SPARSE_ITERS")

    @classmethod
    def check(cls, cfg: CfgNode) -> None:
        """Refuse settings that no batch can be made with."""
        for key, value, least in (
            ("INPUT.CROP_PADDING", cfg.INPUT.CROP_PADDING, 0),
            ("TEST.IMS_PER_BATCH", cfg.TEST.IMS_PER_BATCH, 1),
        ):
            if value < least:
                raise UserError(f"{key} is {value}. Set {least} or more.")
        if not 0 < cfg.INPUT.CROP_MIN_AREA <= 1:
            raise UserError(
                f"INPUT.CROP_MIN_AREA is {cfg.INPUT.CROP_MIN_AREA}. Set a share above 0, 1 at most."
            )
        if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise UserError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}. Set RGB or BGR.")

    @classmethod
    def check_to_train(cls, cfg: CfgNode) -> None:
        """Read every dataset that the config names, so that mistakes come before training.

        Raises:
            UserError: a mistake in the data, a test set of other classes than the training set, or
                settings that classification does not have or that exclude each other.
        """
        cls.check(cfg)
        if cfg.INPUT.RANDOM_FLIP not in ("none", "horizontal"):
            raise UserError(
                f"INPUT.RANDOM_FLIP is {cfg.INPUT.RANDOM_FLIP!r}. Set none or horizontal for "
                f"classification."
            )
        if cfg.DSD.ENABLED and cfg.REPR.ENABLED:
            raise UserError(
                "DSD.ENABLED and REPR.ENABLED are True, but both take weights out and bring them "
                "back. Set one of them to False."
            )
        train = training_set(cfg)
        classes = training_images(cfg).classes
        for name in cfg.DATASETS.TEST:
            found = load_images(cfg, name).classes
            if found != classes:
                raise UserError(
                    f"{name} has other classes than {train}, or in another order "
                    f"({difference(classes, found)}). Set datasets with the same ones."
                )

    @classmethod
    def check_to_evaluate(cls, cfg: CfgNode, weights: str) -> None:
        """Read the test sets, whose classes must be those that the weights were trained on."""
        recorded = recorded_names(weights)
        for name in cfg.DATASETS.TEST:
            check_names(recorded, load_images(cfg, name).classes, f"Dataset {name}")

    @classmethod
    def training_images(cls, cfg: CfgNode) -> int:
        """How many images a config trains on; reads the data."""
        return len(load_images(cfg, training_set(cfg)))

    @classmethod
    def in_iterations(cls, cfg: CfgNode) -> CfgNode:
        """See :func:`repr_det.classification.epochs.resolve_epochs`; reads the data."""
        return resolve_epochs(cfg, cls.training_images(cfg))

    def build_hooks(self) -> list[HookBase]:
        """The hooks of every task, names of classes, and Dense-Sparse-Dense if it is asked for."""
        train = training_set(self.cfg)
        names = ClassNames(f"Dataset {train}", training_images(self.cfg).classes)
        hooks = [names, *super().build_hooks()]
        if self.cfg.DSD.ENABLED:
            keys = self.cfg.DSD
            dsd = DenseSparseDenseHook(keys.DENSE_ITERS, keys.SPARSE_ITERS, keys.SPARSITY)
            dsd.check_fits(self.cfg.SOLVER.MAX_ITER)
            # Before the checkpointer, so that a checkpoint holds the masks of its own weights.
            hooks.insert(0, dsd)
        return hooks

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a checkpoint's state of the trainer.

        Raises:
            UserError: it was written in the sparse part of DSD and this run is without.
        """
        state = state_dict.get("hooks", {}).get(DenseSparseDenseHook.__name__, {})
        if state.get("masks") and not self.cfg.DSD.ENABLED:
            raise UserError(
                "This checkpoint was written in the sparse part of a DSD run, and DSD.ENABLED is "
                "False. Resume with DSD, or start a new run from it as MODEL.WEIGHTS."
            )
        super().load_state_dict(state_dict)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> ArrayTrainLoader | FileTrainLoader:
        """Endless training batches; ``set_iteration`` makes them start elsewhere."""
        data = training_images(cfg)
        common = {
            "batch_size": cfg.SOLVER.IMS_PER_BATCH,
            "seed": cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
            "share": _share(),
            "bgr": cfg.INPUT.FORMAT == "BGR",
        }
        flip = cfg.INPUT.RANDOM_FLIP == "horizontal"
        if isinstance(data, ImageArrays):
            return ArrayTrainLoader(
                data,
                device=_device(cfg),
                crop_padding=cfg.INPUT.CROP_PADDING,
                flip=flip,
                **common,
            )
        return FileTrainLoader(
            data,
            transform=train_transform(cfg.INPUT.IMAGE_SIZE, cfg.INPUT.CROP_MIN_AREA, flip),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            **common,
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """This process's part of a test set, in batches, with a length."""
        data = load_images(cfg, dataset_name)
        common = {
            "batch_size": cfg.TEST.IMS_PER_BATCH,
            "share": _share(),
            "bgr": cfg.INPUT.FORMAT == "BGR",
        }
        if isinstance(data, ImageArrays):
            return ArrayTestLoader(data, device=_device(cfg), **common)
        return file_test_loader(
            data,
            image_size=cfg.INPUT.IMAGE_SIZE,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            **common,
        )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> AccuracyEvaluator:
        """Top-1 and top-5 accuracy and loss."""
        return AccuracyEvaluator()


def _device(cfg: CfgNode) -> torch.device:
    if cfg.MODEL.DEVICE == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(cfg.MODEL.DEVICE)


def _share() -> Share:
    return Share(comm.get_rank(), comm.get_world_size())
