"""Converts lengths in epochs to iterations."""

from __future__ import annotations

import math

from detectron2.config import CfgNode

from repr_det.errors import UserError


def iterations_for(epochs: float, images: int, batch_size: int) -> int:
    """Iterations after which every image was shown ``epochs`` times, rounded up.

    Args:
        epochs: at least 0.
        images: size of the training set.
        batch_size: images of one iteration, over all processes.
    """
    # Rounded first, so that 0.1 epochs of 1,000 images are 100 images and not 100.00000000000001.
    return math.ceil(round(epochs * images / batch_size, 6))


def resolve_epochs(cfg: CfgNode, images: int) -> CfgNode:
    """A config in which every length is in iterations.

    Keys in epochs that are not zero or empty replace their counterparts in iterations, and S1, S2
    and WARMUP of RePr are in epochs where ``REPR.UNIT`` is ``"epoch"``. In the result the keys in
    epochs are zero and the unit is ``"iteration"``, so resolving it again changes nothing.

    Every key is rounded up on its own. So a period is longer than its epochs where the batch does
    not divide the images: 50,000 images in batches of 64 are 781.25 iterations an epoch. With
    ``EVAL_EPOCHS`` 1, the 20th evaluation comes at iteration 15,640, 15 iterations after the end of
    an S1 of 20 epochs.

    Args:
        cfg: a config with the keys of classification; it is not changed.
        images: size of the training set.

    Raises:
        UserError: a negative number of epochs, an unknown unit, or an empty batch.
    """
    if cfg.SOLVER.IMS_PER_BATCH < 1:
        raise UserError(f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}. Set 1 or more.")
    frozen = cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()

    def convert(epochs: float, key: str) -> int:
        if epochs < 0:
            raise UserError(f"{key} is {epochs}. Set 0 or more.")
        return iterations_for(epochs, images, cfg.SOLVER.IMS_PER_BATCH)

    for node, name, target in (
        (cfg.SOLVER, "MAX_EPOCHS", "MAX_ITER"),
        (cfg.SOLVER, "WARMUP_EPOCHS", "WARMUP_ITERS"),
        (cfg.SOLVER, "CHECKPOINT_EPOCHS", "CHECKPOINT_PERIOD"),
        (cfg.SOLVER, "CYCLE_EPOCHS", "CYCLE_ITERS"),
        (cfg.TEST, "EVAL_EPOCHS", "EVAL_PERIOD"),
        (cfg.DSD, "DENSE_EPOCHS", "DENSE_ITERS"),
        (cfg.DSD, "SPARSE_EPOCHS", "SPARSE_ITERS"),
    ):
        if node[name]:
            node[target] = convert(node[name], name)
            node[name] = 0
    if cfg.SOLVER.STEPS_EPOCHS:
        cfg.SOLVER.STEPS = tuple(convert(step, "STEPS_EPOCHS") for step in cfg.SOLVER.STEPS_EPOCHS)
        cfg.SOLVER.STEPS_EPOCHS = ()
    if cfg.REPR.UNIT != "iteration":
        if cfg.REPR.UNIT != "epoch":
            raise UserError(f'REPR.UNIT is {cfg.REPR.UNIT!r}. Set "iteration" or "epoch".')
        for name in ("S1", "S2", "WARMUP"):
            cfg.REPR[name] = convert(cfg.REPR[name], f"REPR.{name}")
        cfg.REPR.UNIT = "iteration"
    if frozen:
        cfg.freeze()
    return cfg
