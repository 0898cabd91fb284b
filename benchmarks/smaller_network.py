#!/usr/bin/env python3
"""Time of a step of S2 without the pruned filters, and with them as zeros, against standard.

    python benchmarks/smaller_network.py [resnet50] [faster_rcnn_R_50_FPN] [--rounds 8]

Three copies of a network take turns, one step each, in one process and on one batch: the whole
network; S2 as a masked network; S2 as a physically smaller one. 30 % of the filters are dropped by
the default ranking, from random weights. torchvision's ResNet-50 sees 4 images of 128 pixels;
Detectron2's Faster R-CNN R50-FPN, as the model zoo configures it (FREEZE_AT 2, FrozenBN), one of
800 x 1067. A step is forward, backward and optimizer step. Ratios are taken round by round;
reported are their median, lowest and highest, beside the ratio of multiply-adds.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from detectron2 import model_zoo
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from step_time import environment
from torch import Tensor, nn

from repr_det import RePr, RePrSchedule
from repr_det.engine.batches import training_loss
from repr_det.engine.compact import Compact

RESULT = Path(__file__).with_suffix(".json")
VARIANTS = ("standard", "masked", "smaller")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Task = tuple[nn.Module, Any, Callable[[nn.Module, Any], Tensor]]
"""A network, a batch, and ``loss(network, batch)``."""


def resnet50() -> Task:
    """The classifier of torchvision, on noise."""
    batch = torch.randn(4, 3, 128, 128, device=DEVICE), torch.arange(4, device=DEVICE)
    network = torchvision.models.resnet50().to(DEVICE)
    return network, batch, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])


def faster_rcnn() -> Task:
    """Detectron2's detector on noise with eight objects."""
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", DEVICE
    network = build_model(cfg)
    corner = torch.rand(8, 2) * torch.tensor([700.0, 500.0])
    objects = Instances((800, 1067))
    objects.gt_boxes = Boxes(torch.cat([corner, corner + 60 + 200 * torch.rand(8, 2)], 1))
    objects.gt_classes = torch.arange(8)
    image = torch.randint(0, 256, (3, 800, 1067), dtype=torch.uint8)
    batch = [{"image": image, "height": 800, "width": 1067, "instances": objects}]
    return network, batch, training_loss


TASKS = {"resnet50": resnet50, "faster_rcnn_R_50_FPN": faster_rcnn}


def steps(name: str) -> tuple[dict[str, Callable[[], float]], float]:
    """What makes one step of each variant and returns its seconds; the ratio of multiply-adds."""
    torch.manual_seed(0)
    network, batch, loss = TASKS[name]()
    network.train()
    run: dict[str, Callable[[], float]] = {}
    multiply_adds = 0.0
    for variant in VARIANTS:
        model = copy.deepcopy(network)
        # Hardly moves: a detector with random weights would diverge.
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-8, momentum=0.9)
        if variant != "standard":
            arguments = {"batches": lambda: iter([batch]), "loss": loss}
            method = RePr(model, optimizer, RePrSchedule(1, 10**6, 1), 0.3, **arguments)
            method.step(1)
            if variant == "smaller":
                shrunk = Compact(model, optimizer, **arguments).shrink(method)
                multiply_adds = shrunk.after.multiply_adds / shrunk.before.multiply_adds

        def step(model: nn.Module = model, optimizer: torch.optim.SGD = optimizer) -> float:
            begin = time.perf_counter()
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - begin

        run[variant] = step
    return run, multiply_adds


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Ratios of one network."""
    with EventStorage():
        run, multiply_adds = steps(name)
        seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for index in range(rounds + 1):
            # Nobody always runs behind the same other one.
            for variant in VARIANTS if index % 2 else VARIANTS[::-1]:
                value = run[variant]()
                if index:  # the first is to warm up
                    seconds[variant].append(value)
    result: dict[str, Any] = {"multiply_adds": round(multiply_adds, 4)}
    for variant in VARIANTS[1:]:
        ratios = [a / b for a, b in zip(seconds[variant], seconds["standard"], strict=True)]
        result[variant] = {
            "ratio": round(statistics.median(ratios), 4),
            "range": [round(min(ratios), 4), round(max(ratios), 4)],
        }
    result |= {
        "rounds": rounds,
        "seconds_standard": round(statistics.median(seconds["standard"]), 4),
    }
    return result | environment()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(TASKS))
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in args.networks or TASKS:
        record[name] = measure(name, args.rounds)
        print(name, json.dumps(record[name], indent=1), flush=True)
        RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
