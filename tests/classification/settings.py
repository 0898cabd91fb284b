"""A config and data small enough for tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from repr_det.classification import add_classification_config, register_image_arrays
from repr_det.engine.config import get_cfg

needs_cifar10 = pytest.mark.skipif(
    not any(
        (Path(os.environ.get("DETECTRON2_DATASETS", "")) / place).exists()
        for place in ("cifar10/cifar10.npz", "cifar10.npz", "cifar10/cifar-10-batches-py")
    )
    or "DETECTRON2_DATASETS" not in os.environ,
    reason="needs CIFAR-10 under DETECTRON2_DATASETS",
)


def make_arrays(count: int, classes: int = 4, size: int = 16, seed: int = 0):
    """Images whose class is the brightest corner, with noise: learnable and not trivial."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    images = torch.randint(0, 120, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    half = size // 2
    for index, label in enumerate(labels.tolist()):
        top, left = divmod(label, 2)
        images[index, :, top * half : (top + 1) * half, left * half : (left + 1) * half] += 80
    return images, labels


def register(name: str, *args, **kwargs) -> str:
    """Register arrays under a name, replacing what an earlier test left there."""
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_image_arrays(name, *args, **kwargs)
    return name


def small_cfg(output_dir: str = "") -> CfgNode:
    cfg = get_cfg(add_classification_config)
    cfg.MODEL.META_ARCHITECTURE = "ImageClassifier"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.CLASSIFIER.NAME = "c3_8"
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 4
    cfg.MODEL.PIXEL_MEAN = [100.0, 100.0, 100.0]
    cfg.MODEL.PIXEL_STD = [50.0, 50.0, 50.0]
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.IMAGE_SIZE = 16
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.SOLVER.IMS_PER_BATCH = 20
    cfg.SOLVER.BASE_LR = 0.05
    cfg.SOLVER.MAX_ITER = 12
    cfg.SOLVER.STEPS = ()
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SOLVER.CHECKPOINT_PERIOD = 1000
    cfg.TEST.IMS_PER_BATCH = 32
    cfg.DATASETS.TRAIN = ("corners_train",)
    cfg.DATASETS.TEST = ("corners_test",)
    cfg.SEED = 5
    cfg.OUTPUT_DIR = output_dir
    return cfg


def register_corners() -> None:
    """The small training and test set that :func:`small_cfg` names."""
    classes = ["a", "b", "c", "d"]
    register("corners_train", *make_arrays(120), classes)
    register("corners_test", *make_arrays(50, seed=1), classes)
