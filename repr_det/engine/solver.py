"""Optimizers and learning-rate schedules by config, for every task."""

from __future__ import annotations

from typing import Any

import detectron2.solver
import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.solver.build import (
    WarmupParamScheduler,
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
)
from fvcore.common.param_scheduler import ParamScheduler
from torch.optim import Optimizer

from repr_det.errors import UserError

TRIANGULAR = "Triangular"
_DETECTRON2S = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")
OPTIMIZERS = ("SGD", "Adam", "AdamW", "RMSprop")

_IN_A_CHECKPOINT = {
    "initial_lr": "BASE_LR or BIAS_LR_FACTOR",
    "weight_decay": "WEIGHT_DECAY, WEIGHT_DECAY_NORM or WEIGHT_DECAY_BIAS",
    "momentum": "MOMENTUM",
    "nesterov": "NESTEROV",
    "betas": "BETAS",
    "alpha": "RMSPROP_ALPHA",
    "decoupled_weight_decay": "OPTIMIZER",
}
"""Options of parameter groups that a checkpoint sets on resumption, and the keys below SOLVER."""


def add_solver_config(cfg: CfgNode) -> None:
    """Add the keys of optimizers and schedules to a Detectron2 config, in place."""
    # SGD, Adam, AdamW or RMSprop. Only SGD uses SOLVER.MOMENTUM and SOLVER.NESTEROV.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Decay rates of the two moments of Adam and AdamW.
    cfg.SOLVER.BETAS = (0.9, 0.999)
    # Decay rate of RMSprop's second moment.
    cfg.SOLVER.RMSPROP_ALPHA = 0.99
    # Take the optimizer's step in one kernel. PyTorch's fused SGD with momentum fails where a
    # parameter gets its first gradient after others.
    cfg.SOLVER.FUSED = False
    # SOLVER.LR_SCHEDULER_NAME may also be "Triangular": in every CYCLE_ITERS iterations, the
    # learning rate rises linearly from BASE_LR to BASE_LR + CYCLE_AMPLITUDE and falls back.
    cfg.SOLVER.CYCLE_ITERS = 0
    # How far the learning rate of "Triangular" rises above BASE_LR.
    cfg.SOLVER.CYCLE_AMPLITUDE = 0.005


def build_optimizer(cfg: CfgNode, model: torch.nn.Module) -> Optimizer:
    """An optimizer over a model's parameters, with Detectron2's parameter groups and clipping.

    Raises:
        UserError: the optimizer is not in :data:`OPTIMIZERS`, has no fused step, or refuses its
            keys.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in OPTIMIZERS:
        raise UserError(
            f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}. Set one of {', '.join(OPTIMIZERS)}."
        )
    build = detectron2.solver.build_optimizer if solver.OPTIMIZER == "SGD" else _build_adaptive
    try:
        optimizer = build(cfg, model)
    except (ValueError, IndexError) as error:  # IndexError: of one number in BETAS
        raise UserError(
            f"SOLVER.OPTIMIZER {solver.OPTIMIZER} cannot be built ({error}). Correct its keys "
            "below SOLVER, such as BASE_LR, MOMENTUM, BETAS or CLIP_GRADIENTS."
        ) from error
    if solver.FUSED:
        if solver.OPTIMIZER == "RMSprop":
            raise UserError(
                "SOLVER.FUSED is True, but PyTorch has no fused RMSprop. Set it to False, or set "
                "another SOLVER.OPTIMIZER."
            )
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, False
    return optimizer


def _build_adaptive(cfg: CfgNode, model: torch.nn.Module) -> Optimizer:
    solver = cfg.SOLVER
    arguments = {"alpha": solver.RMSPROP_ALPHA}
    if solver.OPTIMIZER != "RMSprop":
        arguments = {"betas": tuple(solver.BETAS)}
    optimizer = getattr(torch.optim, solver.OPTIMIZER)(
        get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        ),
        lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        foreach=True,
        **arguments,
    )
    return maybe_add_gradient_clipping(cfg, optimizer)


def check_resumed(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Refuse to resume with other options than those in a checkpoint, which would go on unnoticed.

    Args:
        optimizer: of this run.
        state: of the optimizer in the checkpoint.

    Raises:
        UserError: an option of a parameter group has changed.
    """
    advice = "Resume with the same, or start a new run from the checkpoint as MODEL.WEIGHTS."
    both = optimizer.param_groups, state["param_groups"]
    # Parameters with the same options are one group.
    sizes = [[len(group["params"]) for group in groups] for groups in both]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"The optimizer groups parameters by other options than in the checkpoint "
            f"(SOLVER.WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS, BIAS_LR_FACTOR), or other layers are "
            f"frozen. {advice}"
        )
    for now, before in zip(*both, strict=True):
        if any((key in now) != (key in before) for key in ("momentum", "betas", "alpha")):
            raise UserError(f"The checkpoint was written with another SOLVER.OPTIMIZER. {advice}")
        for key, name in _IN_A_CHECKPOINT.items():
            if key in now and key in before and now[key] != before[key]:
                raise UserError(
                    f"The optimizer's {key} was {before[key]} in the checkpoint and is {now[key]} "
                    f"now (SOLVER.{name}). {advice}"
                )


class TriangularParamScheduler(ParamScheduler):
    """A multiplier that rises from 1 to a peak and falls back in every period (Smith 2017).

    Args:
        peak: the highest multiplier.
        period: length of a period as a share of the whole training.
    """

    def __init__(self, peak: float, period: float) -> None:
        self._peak = peak
        self._period = period

    def __call__(self, where: float) -> float:
        """The multiplier at a share of the training, from 0 to 1."""
        phase = where / self._period % 1.0
        return 1 + (self._peak - 1) * (1 - abs(2 * phase - 1))


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRMultiplier:
    """The learning-rate schedule that ``SOLVER.LR_SCHEDULER_NAME`` names.

    This is one of Detectron2's, or "Triangular", the cyclical rate of the paper's study, after
    Detectron2's warm-up.

    Raises:
        UserError: the name is unknown, a triangular schedule has no period or no rate, or
            Detectron2 refuses its keys.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME in _DETECTRON2S:
        try:
            return detectron2.solver.build_lr_scheduler(cfg, optimizer)
        except (ValueError, AssertionError, ZeroDivisionError) as error:
            raise UserError(
                f"SOLVER.LR_SCHEDULER_NAME {solver.LR_SCHEDULER_NAME} cannot be built ({error}). "
                f"Correct SOLVER.STEPS, SOLVER.BASE_LR or SOLVER.BASE_LR_END."
            ) from error
    if solver.LR_SCHEDULER_NAME != TRIANGULAR:
        raise UserError(
            f"SOLVER.LR_SCHEDULER_NAME is {solver.LR_SCHEDULER_NAME!r}. Set it to one of "
            f"{', '.join((*_DETECTRON2S, TRIANGULAR))}."
        )
    if solver.CYCLE_ITERS < 1:
        raise UserError(
            f"SOLVER.CYCLE_ITERS is {solver.CYCLE_ITERS}. Set the length of a period of the "
            "cyclical learning rate."
        )
    if solver.BASE_LR <= 0:
        raise UserError(f"SOLVER.BASE_LR is {solver.BASE_LR}. Set a rate above 0 for {TRIANGULAR}.")
    schedule: ParamScheduler = TriangularParamScheduler(
        1 + solver.CYCLE_AMPLITUDE / solver.BASE_LR, solver.CYCLE_ITERS / solver.MAX_ITER
    )
    if solver.WARMUP_ITERS:
        length = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
        if solver.WARMUP_METHOD not in ("linear", "constant"):
            raise UserError(
                f"SOLVER.WARMUP_METHOD is {solver.WARMUP_METHOD!r}. Set linear or constant."
            )
        schedule = WarmupParamScheduler(
            schedule, solver.WARMUP_FACTOR, length, solver.WARMUP_METHOD
        )
    return LRMultiplier(optimizer, multiplier=schedule, max_iter=solver.MAX_ITER)
