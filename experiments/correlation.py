"""How well criteria agree with the greedy oracle (paper, section 5)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
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


def held_out_batches(trainer: ClassificationTrainer) -> Iterator[dict[str, Tensor]]:
    """:data:`IMAGES` held-out training images, in as many batches as a criterion looks at."""
    cfg = trainer.cfg.clone()
    cfg.defrost()
    cfg.TEST.IMS_PER_BATCH = IMAGES // BATCHES
    loader = trainer.build_test_loader(cfg, held_out_name(cfg.DATASETS.TRAIN[0]))
    return itertools.islice(iter(loader), BATCHES)


def oracle_correlations(trainer: ClassificationTrainer) -> Correlations:
    """Correlations of every criterion's scores with the greedy oracle's, on a trained network.

    Args:
        trainer: with the network, and held-out images in its config.

    Returns:
        By criterion, then by layer or :data:`EVERYWHERE`: ``"rank"``, Spearman's correlation, and
        ``"value"``, Pearson's; None where scores are constant.
    """
    method = RePr(
        trainer.model,
        trainer.optimizer,
        RePrSchedule(1, 1, 1),
        batches=lambda: held_out_batches(trainer),
        loss=training_loss,
    )
    trainer.model.train()
    scores = {
        name: criterion(
            method.layers,
            Data(
                trainer.model,
                lambda: held_out_batches(trainer),
                training_loss,
                torch.Generator().manual_seed(trainer.cfg.REPR.SEED),
                filter_progress,
            ),
        )
        for name, criterion in CRITERIA.items()
    }
    oracle = scores.pop("oracle")
    names = [layer.name for layer in method.layers]
    places = {EVERYWHERE: names, **{name: [name] for name in names}}
    return {
        name: {
            place: agreement(_joined(found, layers), _joined(oracle, layers))
            for place, layers in places.items()
        }
        for name, found in scores.items()
    }


def agreement(scores: np.ndarray, oracle: np.ndarray) -> dict[str, float | None]:
    """Correlations of two scores of the same filters, each (n,); None where one is constant."""
    if np.ptp(scores) == 0 or np.ptp(oracle) == 0:
        return {"rank": None, "value": None}
    return {
        "rank": float(stats.spearmanr(scores, oracle).statistic),
        "value": float(stats.pearsonr(scores, oracle).statistic),
    }


def _joined(scores: dict[str, Tensor], names: list[str]) -> np.ndarray:
    return torch.cat([scores[name].double().cpu() for name in names]).numpy()
