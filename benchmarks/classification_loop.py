#!/usr/bin/env python3
"""Seconds per epoch of C^3(32) through the trainer, against a bare PyTorch loop.

    python benchmarks/classification_loop.py [--steps 40] [--rounds 12] [--json FILE]

Both train the same network, as the config builds it, on the same images and labels in memory, in
one process. They take turns of so many steps each, so that whatever else the machine does meets
both; a round gives one ratio, and the median of the ratios is reported with the lowest and highest.
The bare loop indexes, normalises and steps, and nothing else. The trainer has all its hooks and
writers, with RePr in its full phase and without RePr. The images are noise of CIFAR-10's size,
which costs the same as CIFAR-10.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from clock import seconds
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from repr_det.classification import (
    ClassificationTrainer,
    add_classification_config,
    register_image_arrays,
)
from repr_det.engine.config import config_path, get_cfg
from repr_det.engine.environment import environment

BOUND = 1.1


def make_cfg(output_dir: str, with_repr: bool) -> CfgNode:
    """The paper's setting, never ending and without evaluations and checkpoints."""
    cfg = get_cfg(add_classification_config)
    cfg.merge_from_file(config_path("cifar10_c3_32.yaml"))
    cfg.OUTPUT_DIR = output_dir
    cfg.REPR.ENABLED = with_repr
    cfg.TEST.EVAL_EPOCHS = 0
    cfg.SOLVER.CHECKPOINT_EPOCHS = 10_000
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("noise",)
    return cfg


def trainer_steps(trainer: ClassificationTrainer) -> Callable[[int], None]:
    """A function that runs steps as ``TrainerBase.train`` does."""
    trainer.storage = EventStorage(0)
    trainer.iter = trainer.start_iter = 0
    with trainer.storage:
        trainer.before_train()

    def run(steps: int) -> None:
        with trainer.storage:
            for _ in range(steps):
                trainer.before_step()
                trainer.run_step()
                trainer.after_step()
                trainer.iter += 1

    return run


def bare_steps(trainer: ClassificationTrainer) -> Callable[[int], None]:
    """A function that runs steps of a loop without a trainer, on the trainer's tensors."""
    model = copy.deepcopy(trainer.model)
    network, mean, std = model.network, model.pixel_mean, model.pixel_std
    images, labels = trainer.data_loader.images, trainer.data_loader.labels
    cfg = trainer.cfg
    optimizer = torch.optim.SGD(
        network.parameters(), lr=cfg.SOLVER.BASE_LR, momentum=cfg.SOLVER.MOMENTUM
    )
    order = torch.randperm(len(images)).to(images.device).split(cfg.SOLVER.IMS_PER_BATCH)
    step = 0

    def run(steps: int) -> None:
        nonlocal step
        for _ in range(steps):
            indices = order[step % (len(order) - 1)]
            step += 1
            batch = images[indices].contiguous(memory_format=model.memory_format)
            loss = F.cross_entropy(network((batch - mean) / std), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40, help="steps of one turn")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each")
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args()
    images = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8)
    register_image_arrays("noise", images, torch.randint(0, 10, (50_000,)))
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            name: ClassificationTrainer(make_cfg(f"{folder}/{name}", name == "repr"))
            for name in ("standard", "repr")
        }
        logging.disable(logging.INFO)
        runs = {"bare": bare_steps(trainers["standard"])}
        runs.update({name: trainer_steps(trainer) for name, trainer in trainers.items()})
        for run in runs.values():
            run(5)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                times[name].append(seconds(partial(run, args.steps)))
    loader = trainers["standard"].data_loader
    steps_per_epoch = len(loader.labels) / loader.order.batch_size
    result = {
        **environment(str(loader.images.device)),
        "seconds_per_epoch": {
            name: statistics.median(t) / args.steps * steps_per_epoch for name, t in times.items()
        },
        "ratio_to_bare": {},
    }
    for name in trainers:
        ratios = [a / b for a, b in zip(times[name], times["bare"], strict=True)]
        result["ratio_to_bare"][name] = {
            "median": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    worst = max(ratio["median"] for ratio in result["ratio_to_bare"].values())
    print(f"Bound of {BOUND} times the bare loop: {'kept' if worst <= BOUND else 'MISSED'}.")


if __name__ == "__main__":
    main()
