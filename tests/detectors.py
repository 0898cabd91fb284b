"""Small detectors that the tests train, on real COCO images where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_plain_cfg

HAS_COCO = (
    Path(os.environ.get("DETECTRON2_DATASETS", "")) / "coco/annotations/instances_val2017.json"
).is_file() and "DETECTRON2_DATASETS" in os.environ

needs_coco = pytest.mark.skipif(
    not HAS_COCO, reason="DETECTRON2_DATASETS does not lead to COCO 2017 images"
)


def shrink(cfg: CfgNode, output_dir: Path) -> CfgNode:
    """Make a config small enough for a test: a narrow ResNet-50, small images, few proposals."""
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 32
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 20
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 10
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.INPUT.MAX_SIZE_TRAIN = 96
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.INPUT.MAX_SIZE_TEST = 96
    cfg.DATASETS.TRAIN = ("coco_2017_val",)
    cfg.DATASETS.TEST = ("coco_2017_val",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 1
    cfg.SOLVER.BASE_LR = 0.002
    cfg.SOLVER.STEPS = ()
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SOLVER.MAX_ITER = 10
    cfg.TEST.EVAL_PERIOD = 0
    cfg.OUTPUT_DIR = str(output_dir)
    cfg.SEED = 1
    return cfg


def plain_cfg(output_dir: Path, zoo: str = "COCO-Detection/faster_rcnn_R_50_FPN_1x") -> CfgNode:
    """A small config of Detectron2 alone, without any key of this package."""
    cfg = get_plain_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(f"{zoo}.yaml"))
    return shrink(cfg, output_dir)
