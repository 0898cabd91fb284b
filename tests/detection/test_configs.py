"""The shipped configs of detection are what their comments say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from repr_det import RePrHook
from repr_det.detection.shapes import CLASSES
from repr_det.detection.trainer import DetectionTrainer
from repr_det.tasks import get_cfg, trainer_for
from tests.shipped import CLASSIFIERS, first_fall
from tests.shipped import CONFIGS as FOLDER

BASES = {path for path in FOLDER.iterdir() if path.name.startswith("Base-")}
# Whatever is no classifier's by its name, so that no file is left out.
CONFIGS = sorted(set(FOLDER.iterdir()) - BASES - set(CLASSIFIERS))
# Detectron2 has no 1x schedule for ResNet-101.
ZOO = {
    "repr_faster_rcnn": "COCO-Detection/faster_rcnn_R_50_FPN_1x",
    "repr_faster_rcnn_R50_C4": "COCO-Detection/faster_rcnn_R_50_C4_1x",
    "repr_faster_rcnn_R101_FPN": "COCO-Detection/faster_rcnn_R_101_FPN_3x",
    "repr_faster_rcnn_R101_C4": "COCO-Detection/faster_rcnn_R_101_C4_3x",
    "repr_mask_rcnn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x",
    "repr_mask_rcnn_R50_C4": "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x",
    "repr_mask_rcnn_R101_FPN": "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x",
    "repr_mask_rcnn_R101_C4": "COCO-InstanceSegmentation/mask_rcnn_R_101_C4_3x",
}
# Their weights, and their networks.
FINETUNE = {
    "finetune_faster_rcnn": "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml",
    "finetune_mask_rcnn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml",
}


def load(path: Path | str) -> CfgNode:
    """With every key known, or Detectron2 refuses it."""
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    return cfg


def named(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def test_every_file_is_a_tested_config_or_a_base():
    assert all(path.suffix == ".yaml" for path in FOLDER.iterdir())
    lines = {line for path in FOLDER.iterdir() for line in path.read_text().splitlines()}
    assert {path for path in BASES if f"_BASE_: {path.name}" in lines} == BASES
    assert {path.stem for path in CONFIGS} == {
        *ZOO, *FINETUNE, "demo_faster_rcnn", "neu_det_faster_rcnn", "shapes_convnext"
    }  # fmt: skip


@named(CONFIGS)
def test_a_config_builds_its_model_and_ends_cycles_in_time(path):
    """The model can be built, and filters come back before the learning rate falls."""
    cfg = load(path)
    assert trainer_for(cfg) is DetectionTrainer
    assert cfg.REPR.ENABLED is (path.stem not in FINETUNE)
    cfg.REPR.ENABLED = True
    hook = RePrHook.from_config(cfg)
    hook.check_fits(cfg.SOLVER.MAX_ITER)
    assert hook.schedule.end < first_fall(cfg)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    assert hasattr(model.roi_heads, "mask_head") == ("mask_rcnn" in path.stem)


@pytest.mark.parametrize("name", ZOO)
def test_training_on_coco_is_that_of_detectron2(name):
    """Only RePr is added, and every one has the 1x schedule."""
    standard, zoo = load(FOLDER / f"{name}.yaml"), get_cfg()
    standard.REPR.ENABLED = False
    assert RePrHook.from_config(standard) is None
    zoo.merge_from_file(model_zoo.get_config_file(f"{ZOO[name]}.yaml"))
    once = model_zoo.get_config(f"{ZOO['repr_faster_rcnn']}.yaml").SOLVER
    zoo.SOLVER.STEPS, zoo.SOLVER.MAX_ITER = once.STEPS, once.MAX_ITER
    zoo.REPR = standard.REPR
    assert standard.dump() == zoo.dump()


@pytest.mark.parametrize("name", FINETUNE)
def test_fine_tuning_starts_from_the_detector_that_was_trained_on_coco(name):
    cfg, zoo = load(FOLDER / f"{name}.yaml"), get_cfg()
    zoo.merge_from_file(model_zoo.get_config_file(FINETUNE[name]))
    url = model_zoo.get_checkpoint_url(FINETUNE[name])
    zoo.MODEL.WEIGHTS = url.replace("https://dl.fbaipublicfiles.com/detectron2/", "detectron2://")
    assert cfg.MODEL.dump() == zoo.MODEL.dump() and cfg.INPUT.dump() == zoo.INPUT.dump()


def test_the_demo_is_of_the_built_in_classes():
    assert len(CLASSES) == load(FOLDER / "demo_faster_rcnn.yaml").MODEL.ROI_HEADS.NUM_CLASSES
