"""Schedules that are scaled to the number of workers, and steps in mixed precision."""

from __future__ import annotations

from operator import attrgetter

import pytest
import torch
from detectron2.engine import HookBase
from torch import nn

from repr_det.classification import add_classification_config
from repr_det.classification.trainer import ClassificationTrainer
from repr_det.engine.amp import MixedPrecisionTrainer
from repr_det.engine.config import get_cfg
from repr_det.engine.trainer import RePrTrainer, _scaled_to

LENGTHS = ("SOLVER.MAX_ITER", "SOLVER.CYCLE_ITERS", "REPR.S1", "REPR.S2", "REPR.WARMUP")
DSD_LENGTHS = ("DSD.DENSE_ITERS", "DSD.SPARSE_ITERS")
RATES = attrgetter("SOLVER.BASE_LR", "SOLVER.CYCLE_AMPLITUDE")


def cfg_for_8_workers(keys, *additions):
    cfg = get_cfg(*additions)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    cfg.SOLVER.IMS_PER_BATCH = 64
    for number, key in enumerate(keys, 1):
        cfg.merge_from_list([key, 100 * number])
    cfg.SOLVER.BASE_LR, cfg.SOLVER.CYCLE_AMPLITUDE = 0.02, 0.1
    cfg.freeze()
    return cfg


@pytest.mark.parametrize("workers", [2, 16])
@pytest.mark.parametrize(
    ("trainer", "keys", "additions"),
    [
        (RePrTrainer, LENGTHS, ()),
        (ClassificationTrainer, LENGTHS + DSD_LENGTHS, (add_classification_config,)),
    ],
    ids=["every task", "classification"],
)
def test_lengths_and_rates_are_scaled_together(workers, trainer, keys, additions):
    cfg = cfg_for_8_workers(keys, *additions)
    scaled = _scaled_to(cfg, workers, trainer.LENGTHS)
    assert scaled.is_frozen()
    lengths = attrgetter(*keys)
    assert lengths(scaled) == tuple(length * 8 / workers for length in lengths(cfg))
    assert RATES(scaled) == pytest.approx([rate * workers / 8 for rate in RATES(cfg)])


def test_nothing_is_scaled_where_workers_are_as_many_as_meant():
    cfg = cfg_for_8_workers(LENGTHS)
    assert _scaled_to(cfg, 8, RePrTrainer.LENGTHS) is cfg


class Summed(nn.Linear):
    def forward(self, batch):
        return {"loss": super().forward(batch).sum()}


class SeesGradients(HookBase):
    def after_backward(self):
        self.seen = self.trainer.model.weight.grad.clone()


def test_hooks_run_after_backward_in_mixed_precision():
    model, hook = Summed(2, 1), SeesGradients()
    trainer = MixedPrecisionTrainer(
        model,
        [torch.ones(3, 2)],
        torch.optim.SGD(model.parameters(), 0.1),
        device_type="cpu",
        precision=torch.bfloat16,
    )
    trainer.register_hooks([hook])
    trainer.train(0, 1)
    assert hook.seen.tolist() == [[3, 3]]
