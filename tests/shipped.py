"""The shipped configs, and when their learning rate falls."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.config import CfgNode

from repr_det.engine.solver import build_lr_scheduler

CONFIGS = Path(__file__).parents[1] / "configs"
CLASSIFIERS = sorted(
    path for pattern in ("cifar*.yaml", "imagenet*.yaml") for path in CONFIGS.glob(pattern)
)


def first_fall(cfg: CfgNode) -> float:
    """The first iteration of a lower learning rate than before; infinity where it never falls.

    Found to a thousandth of the training.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    multiplier = build_lr_scheduler(cfg, optimizer)._multiplier
    shares = [step / 1000 for step in range(1000)]
    rates = [multiplier(share) for share in shares]
    falls = (
        share * cfg.SOLVER.MAX_ITER
        for share, before, now in zip(shares[1:], rates, rates[1:], strict=False)
        if now < before
    )
    return next(falls, float("inf"))
