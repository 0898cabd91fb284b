"""How well criteria agree with the greedy oracle (paper, section 5)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from scipy import stats
from torch import Tensor

from repr_det import RePr, RePrSchedule
from repr_det.classification.trainer import ClassificationTrainer
from repr_det.engine.batches import training_loss
from repr_det.engine.data import held_out_name
from repr_det.engine.hook import filter_progress
from repr_det.method.criteria import CRITERIA, Data
from repr_det.method.data_criteria import BATCHES

EVERYWHERE = "all layers"
IMAGES = 5000

Correlations = dict[str, dict[str, dict[str, float | None]]]


def oracle_correlations(trainer: ClassificationTrainer) -> Correlations:
    """Correlations of every criterion's scores with the greedy oracle's, on a trained network.

    Scores are measured on :data:`IMAGES` held-out training images, split into as many batches as a
    criterion reads.

    Args:
        trainer: with the network, and held-out images in its config.

    Returns:
        By criterion, then by layer or :data:`EVERYWHERE`: ``"rank"``, Spearman's correlation, and
        ``"value"``, Pearson's; None where scores are constant.
    """
    cfg = trainer.cfg.clone()
    cfg.defrost()
    cfg.TEST.IMS_PER_BATCH = IMAGES // BATCHES
    loader = trainer.build_test_loader(cfg, held_out_name(cfg.DATASETS.TRAIN[0]))

    def batches() -> Iterator[dict[str, Tensor]]:
        return itertools.islice(iter(loader), BATCHES)

    schedule = RePrSchedule(1, 1, 1)
    layers = RePr(
        trainer.model, trainer.optimizer, schedule, batches=batches, loss=training_loss
    ).layers
    trainer.model.train()
    scores = {}
    for name, criterion in CRITERIA.items():
        generator = torch.Generator().manual_seed(cfg.REPR.SEED)
        data = Data(trainer.model, batches, training_loss, generator, filter_progress)
        found = criterion(layers, data)
        scores[name] = {layer: score.double().cpu() for layer, score in found.items()}
    oracle = scores.pop("oracle")
    names = [layer.name for layer in layers]
    places = {EVERYWHERE: names, **{name: [name] for name in names}}
    return {
        criterion: {
            place: _agreement(*(torch.cat([by[n] for n in chosen]) for by in (found, oracle)))
            for place, chosen in places.items()
        }
        for criterion, found in scores.items()
    }


def _agreement(scores: Tensor, oracle: Tensor) -> dict[str, float | None]:
    """Correlations of two scores of the same filters, each (n,)."""
    if scores.unique().numel() == 1 or oracle.unique().numel() == 1:
        return {"rank": None, "value": None}
    return {
        "rank": float(stats.spearmanr(scores, oracle).statistic),
        "value": float(stats.pearsonr(scores, oracle).statistic),
    }
