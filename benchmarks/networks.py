"""The networks whose speed is measured, and a trainer of each that steps on one batch of noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from clock import now
from detectron2.config import CfgNode
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer, PeriodicWriter
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from repr_det.engine.config import config_path
from repr_det.engine.trainer import RePrTrainer
from repr_det.tasks import get_cfg

NEVER = 10**9
OBJECTS = 8


@dataclass(frozen=True)
class Network:
    """What is trained: a config, and the size of its batch.

    Attributes:
        title: what tables print.
        config: a config file.
        images: in a batch.
        size: height and width of an image in pixels.
        options: KEY, VALUE, ... of the config.
    """

    title: str
    config: str
    images: int
    size: tuple[int, int]
    options: tuple[Any, ...] = ()


NETWORKS = {
    "c3_32": Network("C^3(32), 64 x 32 px", "cifar10_c3_32.yaml", 64, (32, 32)),
    "resnet20": Network("ResNet-20, 128 x 32 px", "cifar10_resnet20.yaml", 128, (32, 32)),
    "resnet50": Network("ResNet-50, 4 x 128 px", "imagenet_resnet50.yaml", 4, (128, 128)),
    "demo": Network("demo (R18-FPN), 8 x 96 px", "demo_faster_rcnn.yaml", 8, (96, 96)),
    "faster_rcnn": Network("Faster R-CNN R50-FPN, 800 px", "repr_faster_rcnn.yaml", 1, (800, 1067)),
    "mask_rcnn": Network("Mask R-CNN R50-FPN, 800 px", "repr_mask_rcnn.yaml", 1, (800, 1067)),
}

_X101 = ("MODEL.RESNETS.DEPTH", 101, "MODEL.RESNETS.NUM_GROUPS", 32,
         "MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.STRIDE_IN_1X1", False)  # fmt: skip
PHASES = {name: NETWORKS[name] for name in ("resnet50", "demo", "faster_rcnn")} | {
    "x101": Network("X101-32x8d-FPN, 800 px", "repr_faster_rcnn.yaml", 1, (800, 1067), _X101)
}
"""Those whose drops and returns are counted in steps."""

VARIANTS: dict[str, tuple[Any, ...]] = {
    "standard": ("REPR.ENABLED", False),
    "full": ("REPR.ENABLED", True, "REPR.S1", NEVER // 4, "REPR.S2", 1),
    "masked": ("REPR.ENABLED", True, "REPR.S1", 1, "REPR.S2", NEVER // 4, "REPR.COMPACT", "off"),
    "smaller": ("REPR.ENABLED", True, "REPR.S1", 1, "REPR.S2", NEVER // 4, "REPR.COMPACT", "on"),
}
"""Standard training, RePr's full phase, S2 with filters as zeros, S2 without them."""


class _OneBatch:
    """The same batch for ever."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(self._batch)

    def reopened(self) -> _OneBatch:
        """A loader of the same data: RePr reads batches of its own."""
        return self


class NoiseTrainer(RePrTrainer):
    """The trainer of every task on a batch of noise; evaluates, saves and writes nothing."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> _OneBatch:
        """Endless noise of the sizes in ``cfg.NOISE``."""
        return _OneBatch(_batch(cfg, cfg.NOISE.IMAGES, tuple(cfg.NOISE.SIZE)))

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model; a detector's proposals are its anchors, whatever the backbone makes of noise.

        So the heads work on equally many proposals in every variant: from random weights it would
        hang on which filters were dropped.
        """
        model = super().build_model(cfg)
        if hasattr(model, "proposal_generator"):
            head = model.proposal_generator.rpn_head
            for layer in (head.objectness_logits, head.anchor_deltas):
                nn.init.zeros_(layer.weight)
        return model

    def build_hooks(self) -> list[Any]:
        """The hooks that have to do with a step."""
        left_out = (EvalHook, PeriodicCheckpointer, PeriodicWriter)
        return [hook for hook in super().build_hooks() if not isinstance(hook, left_out)]


def _batch(cfg: CfgNode, count: int, size: tuple[int, int]) -> Any:
    images = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8)
    if cfg.MODEL.META_ARCHITECTURE == "ImageClassifier":
        labels = torch.arange(count) % cfg.MODEL.CLASSIFIER.NUM_CLASSES
        return {"image": images.to(cfg.MODEL.DEVICE), "label": labels.to(cfg.MODEL.DEVICE)}
    entries = []
    for image in images:
        sides = torch.tensor(size).flip(0)
        corners = torch.rand(OBJECTS, 2) * sides * 0.6
        boxes = torch.cat([corners, corners + sides * (0.1 + 0.3 * torch.rand(OBJECTS, 2))], 1)
        objects = Instances(size)
        objects.gt_boxes = Boxes(boxes)
        objects.gt_classes = torch.arange(OBJECTS) % cfg.MODEL.ROI_HEADS.NUM_CLASSES
        if cfg.MODEL.MASK_ON:
            rectangles = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()
            objects.gt_masks = PolygonMasks([[rectangle] for rectangle in rectangles])
        entry = {"image": image, "height": size[0], "width": size[1], "instances": objects}
        entries.append(entry)
    return entries


def make_trainer(network: Network, folder: str, *overrides: Any) -> NoiseTrainer:
    """A trainer of a network with initial weights, which do not move: the learning rate is zero.

    Args:
        network: which.
        folder: its ``OUTPUT_DIR``.
        overrides: KEY, VALUE, ... merged into the network's config.
    """
    cfg = get_cfg()
    cfg.merge_from_file(config_path(network.config))
    cfg.NOISE = CfgNode({"IMAGES": network.images, "SIZE": list(network.size)})
    cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS, cfg.SEED = folder, "", 0
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = NEVER, (), 0
    # From random weights a detector would diverge, and at any rate the variants' proposals would
    # part, with the work on them.
    cfg.SOLVER.BASE_LR, cfg.TEST.EVAL_PERIOD = 0.0, 0
    cfg.REPR.UNIT, cfg.REPR.N = "iteration", 1
    cfg.merge_from_list([*network.options, *overrides])
    seed_all_rng(0)
    trainer = NoiseTrainer(cfg)
    torch.use_deterministic_algorithms(False)
    trainer.iter, trainer.storage = 0, EventStorage(0)
    with trainer.storage:
        trainer.before_train()
    return trainer


def stepper(trainer: NoiseTrainer) -> Callable[[], float]:
    """A function that makes one step, with its hooks, and returns its seconds."""
    deterministic = trainer.cfg.DETERMINISTIC

    def step() -> float:
        torch.use_deterministic_algorithms(deterministic)
        begin = now()
        with trainer.storage, torch.jit.optimized_execution(not deterministic):
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
        trainer.iter += 1
        return now() - begin

    return step
