"""Small detectors that the tests train, on COCO images where they are at hand, else drawn ones."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_plain_cfg
from detectron2.engine import DefaultPredictor
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model

from repr_det.detection.shapes import register_shapes
from repr_det.engine.checkpoint import SafeCheckpointer
from repr_det.engine.config import config_path
from repr_det.tasks import get_cfg
from tests.device import DEVICE

HAS_COCO = (
    Path(os.environ.get("DETECTRON2_DATASETS", "")) / "coco/annotations/instances_val2017.json"
).is_file() and "DETECTRON2_DATASETS" in os.environ

DATA = "coco_2017_val" if HAS_COCO else "shapes_val"
"""What they are trained on: COCO images, or the built-in dataset where there are none."""

needs_coco = pytest.mark.skipif(
    not HAS_COCO, reason="DETECTRON2_DATASETS does not lead to COCO 2017 images"
)


CYCLES = ["REPR.S1", "2", "REPR.S2", "2", "REPR.N", "2"]


def shrink(cfg: CfgNode, output_dir: Path) -> CfgNode:
    """Make a config small enough for a test: a narrow ResNet-50, small images, few proposals."""
    cfg.MODEL.DEVICE = str(DEVICE)
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
    register_shapes()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (DATA,)
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


def overrides(output_dir: Path, **changes: str) -> list[str]:
    """KEY VALUE pairs of a config as small as :func:`shrink` makes it, with two cycles of RePr."""
    small = shrink(get_cfg(), output_dir)
    keys = [
        "MODEL.DEVICE", "MODEL.WEIGHTS", "MODEL.RESNETS.STEM_OUT_CHANNELS",
        "MODEL.RESNETS.RES2_OUT_CHANNELS", "MODEL.RESNETS.WIDTH_PER_GROUP", "MODEL.RESNETS.NORM",
        "MODEL.BACKBONE.FREEZE_AT", "MODEL.FPN.OUT_CHANNELS",
        "MODEL.RPN.POST_NMS_TOPK_TRAIN", "MODEL.RPN.POST_NMS_TOPK_TEST",
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "MODEL.ROI_BOX_HEAD.FC_DIM",
        "INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST",
        "INPUT.MAX_SIZE_TEST", "DATALOADER.NUM_WORKERS", "SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR",
        "SOLVER.STEPS", "SOLVER.WARMUP_ITERS", "SOLVER.MAX_ITER", "OUTPUT_DIR", "SEED",
    ]  # fmt: skip
    pairs = []
    for key in keys:
        node = small
        for part in key.split("."):
            node = node[part]
        pairs += [key, str(node)]
    return [*pairs, *CYCLES, *(part for pair in changes.items() for part in pair)]


def plain_cfg(output_dir: Path, zoo: str = "COCO-Detection/faster_rcnn_R_50_FPN_1x") -> CfgNode:
    """A small config of Detectron2 alone, without any key of this package."""
    cfg = get_plain_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(f"{zoo}.yaml"))
    return shrink(cfg, output_dir)


class SmallRun(NamedTuple):
    """An untrained Mask R-CNN as a run leaves it, and data on which it is right at times."""

    folder: Path
    cfg: CfgNode
    annotations: Path
    images: Path
    truth: dict[str, Any]


def make_run(folder: Path, classes: Sequence[str] = ("nut", "bolt", "washer")) -> SmallRun:
    """Write a run, and a dataset whose objects are every second of its detections.

    Category ids have gaps, and image ids are not in the order of file names.
    """
    images, output = folder / "images", folder / "run"
    images.mkdir(parents=True)
    output.mkdir()
    cfg = get_cfg()
    cfg.merge_from_file(config_path("repr_mask_rcnn.yaml"))
    cfg.REPR.ENABLED = False
    shrink(cfg, output)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(classes)
    cfg.MODEL.WEIGHTS = str(output / "model_final.pth")
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("small_run",)
    torch.manual_seed(0)
    model = build_model(cfg)
    SafeCheckpointer(model, str(output)).save("model_final", iteration=0)
    (output / "config.yaml").write_text(cfg.dump())
    detector = DefaultPredictor(cfg)
    rng = np.random.default_rng(0)
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 10 * k + 3, "name": name} for k, name in enumerate(classes)],
    }
    for number, shape in enumerate([(48, 64), (64, 48), (60, 60)]):
        pixels = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), shape[::-1])
        name, image_id = f"{number}.png", 9 - number
        cv2.imwrite(str(images / name), pixels)
        height, width = shape
        content["images"].append(
            {"id": image_id, "file_name": name, "height": height, "width": width}
        )
        found = detector(pixels)["instances"]
        for entry in instances_to_coco_json(found, image_id)[::2]:
            x, y, w, h = entry["bbox"]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": 10 * entry["category_id"] + 3,
                    "bbox": entry["bbox"],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
    annotations = folder / "annotations.json"
    annotations.write_text(json.dumps(content))
    return SmallRun(output, cfg, annotations, images, content)
