#!/usr/bin/env python3
"""Time of a training step of K networks at once, for each network, and of one trained alone.

    python benchmarks/together.py cifar10_c3_32.yaml --networks 1 2 5 10 20 50
    python benchmarks/together.py cifar10_resnet20.yaml --networks 1 5 20 --windows 2

Standard training on noise of CIFAR's size, on the GPU where there is one. Times are medians over
windows of 20 steps, in which the losses are looked at once; alone, by the ordinary trainer.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from clock import now
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng

from repr_det.classification import ClassificationTrainer, register_image_arrays
from repr_det.classification.together import WINDOW, Together
from repr_det.engine.config import config_path
from repr_det.engine.environment import environment
from repr_det.tasks import get_cfg

RESULT = Path(__file__).with_suffix(".json")
WARM_UP = 1


class _Clock(HookBase):
    """The time after every window of steps."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % WINDOW == 0:
            self.times.append(now())


def _step(times: list[float], networks: int) -> float:
    """Seconds of a step of one network, a median over windows."""
    windows = [b - a for a, b in zip(times[WARM_UP:-1], times[WARM_UP + 1 :], strict=True)]
    return statistics.median(windows) / WINDOW / networks


def _cfg(config: str, windows: int, folder: str, seed: int) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(config_path(config))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("noise_train",), ()
    cfg.SOLVER.MAX_EPOCHS = cfg.SOLVER.CHECKPOINT_EPOCHS = cfg.TEST.EVAL_EPOCHS = 0
    cfg.SOLVER.STEPS_EPOCHS = ()
    cfg.SOLVER.MAX_ITER = WINDOW * (WARM_UP + 1 + windows)
    cfg.REPR.ENABLED, cfg.REPR.UNIT = False, "iteration"
    cfg.OUTPUT_DIR, cfg.SEED = f"{folder}/{seed}", seed
    return cfg


def alone(config: str, windows: int) -> float:
    """Seconds of a step by the ordinary trainer."""
    with tempfile.TemporaryDirectory() as folder:
        seed_all_rng(0)
        trainer = ClassificationTrainer(_cfg(config, windows, folder, 0))
        clock = _Clock()
        trainer.register_hooks([clock])
        trainer.train()
    return _step(clock.times, 1)


def together(config: str, networks: int, windows: int) -> float:
    """Seconds of a step for each of so many networks at once."""
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        configs = [_cfg(config, windows, folder, seed) for seed in range(networks)]
        Together(configs).train(lambda iterations: times.append(now()))
    return _step(times, networks)


def main() -> None:
    """Measure, print, and record where asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="of a classifier for CIFAR, in configs/")
    parser.add_argument("--networks", type=int, nargs="+", default=[1, 5, 20], metavar="K")
    parser.add_argument("--windows", type=int, default=5, help="of 20 steps each")
    parser.add_argument("--record", action="store_true", help=f"write {RESULT.name}")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (10_000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    classes = _cfg(args.config, 1, "", 0).MODEL.CLASSIFIER.NUM_CLASSES
    register_image_arrays("noise_train", images, torch.arange(len(images)) % classes)
    found: dict[str, Any] = {"alone": alone(args.config, args.windows)}
    print(f"alone: {1000 * found['alone']:.3f} ms a step", flush=True)
    for networks in args.networks:
        seconds = together(args.config, networks, args.windows)
        found[str(networks)] = seconds
        print(
            f"{networks} at once: {1000 * seconds:.3f} ms a step and network, "
            f"{found['alone'] / seconds:.2f} times as fast",
            flush=True,
        )
    if args.record:
        record = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        record[args.config] = {
            "seconds": found,
            "environment": environment("cuda" if torch.cuda.is_available() else "cpu"),
        }
        RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
