"""The task of a config: its keys, its data, its trainer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from repr_det.classification.config import add_classification_config
from repr_det.classification.datasets import (
    take_num_folders,
    use_image_folder,
)
from repr_det.classification.trainer import ClassificationTrainer
from repr_det.detection.config import add_detection_config
from repr_det.detection.datasets import (
    check_same_classes,
    take_num_classes,
    use_coco_data,
)
from repr_det.detection.trainer import DetectionTrainer
from repr_det.engine import command_line, config
from repr_det.engine.trained import merge_trained
from repr_det.engine.trainer import RePrTrainer
from repr_det.errors import UserError

DETECTION, CLASSIFICATION = "detection", "classification"


def get_cfg() -> CfgNode:
    """The default config with the keys of every task."""
    return config.get_cfg(add_detection_config, add_classification_config)


def configure(args: argparse.Namespace) -> CfgNode:
    """The config that parsed arguments describe; registers datasets that they name by files.

    Raises:
        UserError: a mistake in the config or the files, or a detector with keys of classification.
    """
    cfg = get_cfg()
    if args.config_file:
        args.config_file = command_line.merge_config_file(cfg, args.config_file)
    command_line.merge_overrides(cfg, args.opts)
    use_data(cfg, args, args.opts)
    if args.eval_only:
        cfg.DISTILL.TEACHER = ""  # a teacher is not part of the network
    elif task_of(cfg) == DETECTION:
        _check_no_keys_of_classification(cfg)
    return cfg


def _check_no_keys_of_classification(cfg: CfgNode) -> None:
    """Refuse what a detector's config sets for classification: nothing would read it."""
    known = config.flat_settings(config.get_cfg(add_detection_config))
    default = config.flat_settings(get_cfg())
    for key, value in config.flat_settings(cfg).items():
        if key not in known and value != default.get(key, value):
            raise UserError(f"{key} is {value!r}, but only classification reads it. Take it out.")


def use_data(cfg: CfgNode, args: argparse.Namespace, overrides: Sequence[str] = ()) -> None:
    """Register the datasets that parsed arguments name by files, and set them in a config.

    Args:
        cfg: changed in place.
        args: with what :func:`repr_det.cli.arguments.add_data` adds.
        overrides: keys and values of the command line, which are merged already.

    Raises:
        UserError: files that are not there or contradict themselves, or are of the other task.
    """
    ours, other, users = ("data", "folder", "classifiers")
    if task_of(cfg) == CLASSIFICATION:
        ours, other, users = ("folder", "data", "detectors")
    for split in ("train", "test"):
        if getattr(args, f"{split}_{other}"):
            raise UserError(
                f"--{split}-{other} is for {users}. Set --{split}-{ours}, or another config."
            )
    for split, data in (("TRAIN", args.train_data), ("TEST", args.test_data)):
        if data is not None:
            use_coco_data(cfg, split, *data)
    if args.train_data and args.test_data:
        check_same_classes(args.train_data[0], args.test_data[0])
    if named := args.train_data or args.test_data:
        take_num_classes(cfg, named[0], overrides)
    for split, folder in (("TRAIN", args.train_folder), ("TEST", args.test_folder)):
        if folder is not None:
            use_image_folder(cfg, split, *folder)
    if named := args.train_folder or args.test_folder:
        take_num_folders(cfg, named[0], overrides)


def trained_detector_cfg(
    run: Path | None, config_file: str | None, overrides: Sequence[str]
) -> CfgNode:
    """The config of a trained detector; see :func:`repr_det.engine.trained.merge_trained`.

    Raises:
        UserError: it is a classifier's.
    """
    cfg = get_cfg()
    merge_trained(cfg, run, config_file, overrides)
    if trainer_for(cfg) is not DetectionTrainer:
        raise UserError(
            "This is a classifier, not a detector. Evaluate it with `repr-det train --eval-only`."
        )
    return cfg


def task_of(cfg: CfgNode) -> str:
    """:data:`DETECTION` or :data:`CLASSIFICATION`."""
    image_classifier = cfg.MODEL.META_ARCHITECTURE == "ImageClassifier"
    return CLASSIFICATION if image_classifier else DETECTION


def trainer_for(cfg: CfgNode) -> type[RePrTrainer]:
    """The trainer of a config's task."""
    return DetectionTrainer if task_of(cfg) == DETECTION else ClassificationTrainer
