"""Train every shipped config for three steps on tiny data: a full step, a drop and a return.

    python -m tests.every_config PROCESSES FOLDER [CONFIG ...] [--machines N RANK URL]

Networks have their own depth and width; images are small and drawn. Every rank must end with the
same weights. One line a config is printed; the exit status is 1 where one failed.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
import traceback
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.utils import comm

from repr_det.cli import parse
from repr_det.detection.shapes import CLASSES
from repr_det.engine.processes import launch
from repr_det.tasks import configure, get_cfg, trainer_for
from tests.documents import ROOT
from tests.engine.ranks import digest

CONFIGS = sorted(p.name for p in (ROOT / "configs").glob("*.yaml") if p.name[:5] != "Base-")
COMMON = (
    *("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "SOLVER.REFERENCE_WORLD_SIZE", "0"),
    *("SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "0"),
    *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.BASE_LR", "0.0001", "SOLVER.CHECKPOINT_PERIOD", "9"),
    *("REPR.ENABLED", "True", "REPR.UNIT", "iteration", "REPR.WARMUP", "0"),
    *("REPR.S1", "1", "REPR.S2", "1", "REPR.N", "1"),
    *("DATASETS.TEST", "()", "TEST.EVAL_PERIOD", "0", "DATALOADER.NUM_WORKERS", "0", "SEED", "1"),
)
DETECTION = (
    *("DATASETS.TRAIN", "('shapes_val',)", "INPUT.MASK_FORMAT", "bitmask"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MAX_SIZE_TRAIN", "64"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "20", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", str(len(CLASSES)), "DATASETS.HELD_OUT", "0"),
)
CLASSIFICATION = (
    *("SOLVER.MAX_EPOCHS", "0", "SOLVER.STEPS_EPOCHS", "()", "SOLVER.WARMUP_EPOCHS", "0"),
    *("SOLVER.CHECKPOINT_EPOCHS", "0", "SOLVER.CYCLE_EPOCHS", "0", "TEST.EVAL_EPOCHS", "0"),
    *("DSD.DENSE_EPOCHS", "0", "DSD.SPARSE_EPOCHS", "0", "DSD.DENSE_ITERS", "1"),
    *("DSD.SPARSE_ITERS", "1", "DATASETS.HELD_OUT", "0", "SOLVER.CYCLE_ITERS", "2"),
)


def write_class_folders(folder: Path) -> None:
    """Eight images of noise in two classes."""
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            picture = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / name / f"{number}.png"), picture)


def tiny(name: str, folder: Path) -> CfgNode:
    """The config of a file, with tiny data and three steps."""
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / name))
    words = ["train", "--config-file", name]
    if cfg.MODEL.META_ARCHITECTURE == "ImageClassifier":
        words += ["--train-folder", f"{folder.name}_{name}_train", str(folder / "classes")]
        words += CLASSIFICATION
        if not name.startswith("cifar"):
            words += ["INPUT.IMAGE_SIZE", "64"]
        if cfg.DISTILL.TEACHER:
            words += ["DISTILL.WEIGHTS", str(folder / f"{cfg.DISTILL.TEACHER}.pth")]
    else:
        words += DETECTION
    words += [*COMMON, "OUTPUT_DIR", str(folder / name)]
    return configure(parse(words))


def write_teacher(cfg: CfgNode) -> None:
    """A checkpoint of a config's teacher, untrained."""
    teacher = cfg.clone()
    teacher.DISTILL.TEACHER, teacher.MODEL.CLASSIFIER.NAME = "", cfg.DISTILL.TEACHER
    state = trainer_for(teacher).build_model(teacher).state_dict()
    torch.save({"model": state}, cfg.DISTILL.WEIGHTS)


def write_weights(cfg: CfgNode) -> None:
    """Random weights that a network with frozen norms can start from: its branches are damped."""
    model = trainer_for(cfg).build_model(cfg)
    for block in model.modules():
        if isinstance(block, BottleneckBlock):
            block.conv3.norm.weight.fill_(0.1)
    torch.save({"model": model.state_dict()}, f"{cfg.OUTPUT_DIR}.pth")


def train(name: str, folder: Path) -> None:
    """Three steps of a config; every rank must end with the same finite weights."""
    cfg = tiny(name, folder)
    if cfg.DISTILL.TEACHER:
        if comm.is_main_process():
            write_teacher(cfg)
        comm.synchronize()
    elif cfg.MODEL.META_ARCHITECTURE != "ImageClassifier" and cfg.MODEL.RESNETS.NORM == "FrozenBN":
        if comm.is_main_process():
            write_weights(cfg)
        comm.synchronize()
        cfg.MODEL.WEIGHTS = f"{cfg.OUTPUT_DIR}.pth"
    cfg.freeze()
    trainer_class = trainer_for(cfg)
    trainer_class.check(cfg)
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    weights = dict(trainer.model.named_parameters())
    assert all(weight.isfinite().all() for weight in weights.values())
    assert len(set(comm.all_gather(digest(weights)))) == 1, "ranks have other weights"


def main(folder: Path, names: list[str]) -> None:
    """Train each config in this process, or in this rank of several."""
    torch.set_num_threads(1)
    failed = []
    for name in names:
        try:
            train(name, folder)
            if comm.is_main_process():  # All checkpoints together would fill a small disk.
                for left in folder.glob(f"{name}*"):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
        except Exception:
            traceback.print_exc()
            failed.append(name)
        if comm.is_main_process():
            print(f"{name}: {'failed' if name in failed else 'trained'}", flush=True)
        gc.collect()
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("processes", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("configs", nargs="*", default=CONFIGS)
    parser.add_argument("--machines", nargs=3, default=("1", "0", "auto"))
    args = parser.parse_intermixed_args()
    machines, rank, url = args.machines
    write_class_folders(args.folder / "classes")
    launch(
        main,
        args.processes,
        num_machines=int(machines),
        machine_rank=int(rank),
        dist_url=url,
        args=(args.folder, args.configs),
    )
