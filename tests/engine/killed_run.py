"""A small deterministic run that kills itself at a chosen moment, and resumes if it can.

python killed_run.py TASK OUTPUT [MOMENT ITERATION]
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng

from repr_det.detection.shapes import ShapesSpec, register_shapes
from repr_det.tasks import get_cfg, trainer_for
from tests.detectors import shrink

MAX_ITER = 44
S1, S2, CYCLES = 8, 6, 2
CHECKPOINT_PERIOD = 5


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Kill(HookBase):
    """Ends the process before or after the step of an iteration."""

    def __init__(self, moment: str, iteration: int) -> None:
        self._moment, self._iteration = moment, iteration

    def before_step(self) -> None:
        if self._moment == "before_step" and self.trainer.iter == self._iteration:
            die()

    def after_step(self) -> None:
        if self._moment == "after_step" and self.trainer.iter == self._iteration:
            die()


def kill_during_write(iteration: int) -> None:
    """Make the checkpoint of an iteration stop half-way."""
    save = torch.save

    def half(data, file):
        if data.get("iteration") == iteration:
            file.write(b"half a checkpoint")
            file.flush()
            die()
        save(data, file)

    torch.save = half


def kill_before_tag(iteration: int) -> None:
    """Die between a checkpoint's rename and the change of last_checkpoint."""
    replace = os.replace

    def stop(source, target):
        replace(source, target)
        if Path(target).name == f"model_{iteration:07d}.pth":
            die()

    os.replace = stop


def detection(output: str):
    register_shapes(ShapesSpec(size=64, train=12, val=4), prefix="tiny")
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    from repr_det.engine.config import config_path

    cfg.merge_from_file(config_path("repr_faster_rcnn.yaml"))
    shrink(cfg, Path(output))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 6
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("tiny_train",), ("tiny_val",)
    cfg.SOLVER.IMS_PER_BATCH = 2
    return cfg


def retinanet(output: str):
    """Its loss is divided by a running mean that is no buffer of the model."""
    cfg = detection(output)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    cfg.MODEL.RETINANET.NUM_CLASSES = 6
    return cfg


def classification(output: str):
    import numpy as np

    folder = Path(os.environ["DETECTRON2_DATASETS"]) / "cifar10"
    if not (folder / "cifar10.npz").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        arrays = {}
        for split, size in (("train", 50_000), ("test", 10_000)):
            arrays[f"x_{split}"] = rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
            arrays[f"y_{split}"] = np.arange(size, dtype=np.int64) % 10
        # Several ranks may be here at once.
        aside = folder / f"{os.getpid()}.npz"
        np.savez(aside, **arrays)
        os.replace(aside, folder / "cifar10.npz")
    from repr_det.engine.config import config_path

    cfg = get_cfg()
    cfg.merge_from_file(config_path("cifar10_c3_32.yaml"))
    cfg.MODEL.CLASSIFIER.NAME = "c3_32_bn"
    cfg.merge_from_list(
        ["INPUT.CROP_PADDING", 4, "INPUT.RANDOM_FLIP", "horizontal", "SOLVER.IMS_PER_BATCH", 16]
    )
    for node, key in (
        (cfg.SOLVER, "MAX_EPOCHS"), (cfg.SOLVER, "CHECKPOINT_EPOCHS"), (cfg.TEST, "EVAL_EPOCHS")
    ):  # fmt: skip
        node[key] = 0
    cfg.DATASETS.HELD_OUT, cfg.DATASETS.TEST = 40, ("cifar10_heldout",)
    cfg.REPR.UNIT = "iteration"
    cfg.OUTPUT_DIR = output
    return cfg


def changed(task: Callable[[str], Any], key: str, value: str) -> Callable[[str], Any]:
    """A task with another value of one key."""

    def build(output: str) -> Any:
        cfg = task(output)
        cfg.merge_from_list([key, value])
        return cfg

    return build


TASKS = {
    "detection": detection,
    "retinanet": retinanet,
    "classification": classification,
    "detection-compact": changed(detection, "REPR.COMPACT", "on"),
    "classification-compact": changed(classification, "REPR.COMPACT", "on"),
    "detection-previous": changed(detection, "REPR.REINIT.DIRECTION", "previous"),
    "classification-previous": changed(classification, "REPR.REINIT.DIRECTION", "previous"),
}


def main(task: str, output: str, moment: str = "", iteration: str = "-1") -> None:
    torch.set_num_threads(1)
    cfg = TASKS[task](output)
    cfg.DETERMINISTIC = True
    cfg.SEED = 3
    cfg.SOLVER.MAX_ITER = MAX_ITER
    cfg.SOLVER.CHECKPOINT_PERIOD = CHECKPOINT_PERIOD
    cfg.TEST.EVAL_PERIOD = 15
    cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N = S1, S2, CYCLES
    seed_all_rng(3)
    trainer = trainer_for(cfg)(cfg)
    if moment == "write":
        kill_during_write(int(iteration))
    elif moment == "tag":
        kill_before_tag(int(iteration))
    elif moment:
        trainer.register_hooks([Kill(moment, int(iteration))])
    trainer.resume_or_load(resume=True)
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
