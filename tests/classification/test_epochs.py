from __future__ import annotations

import pytest

from repr_det.classification import resolve_epochs
from repr_det.classification.epochs import iterations_for
from tests.classification.settings import small_cfg


@pytest.mark.parametrize(
    ("epochs", "images", "batch_size", "iterations"),
    [(1, 50_000, 64, 782), (110, 50_000, 64, 85_938), (379, 45_000, 64, 266_485), (3, 100, 10, 30)],
)
def test_whole_epochs(epochs, images, batch_size, iterations):
    assert iterations_for(epochs, images, batch_size) == iterations
    assert iterations * batch_size >= epochs * images > (iterations - 1) * batch_size


def cfg_in_epochs():
    cfg = small_cfg()
    cfg.REPR.UNIT = "epoch"
    cfg.REPR.S1 = 20
    cfg.REPR.S2 = 10
    cfg.REPR.WARMUP = 1
    cfg.SOLVER.IMS_PER_BATCH = 10
    cfg.SOLVER.MAX_EPOCHS = 110
    cfg.SOLVER.STEPS_EPOCHS = (95, 100.5)
    cfg.SOLVER.WARMUP_EPOCHS = 2
    cfg.SOLVER.CHECKPOINT_EPOCHS = 5
    cfg.SOLVER.CYCLE_EPOCHS = 50
    cfg.TEST.EVAL_EPOCHS = 1
    cfg.DSD.DENSE_EPOCHS = 60
    cfg.DSD.SPARSE_EPOCHS = 30
    return cfg


def test_every_length_becomes_iterations():
    cfg = cfg_in_epochs()
    before = cfg.dump()
    solved = resolve_epochs(cfg, images=1000)
    assert cfg.dump() == before
    assert solved.SOLVER.MAX_ITER == 11_000
    assert solved.SOLVER.STEPS == (9_500, 10_050)
    assert solved.SOLVER.WARMUP_ITERS == 200
    assert solved.SOLVER.CHECKPOINT_PERIOD == 500
    assert solved.SOLVER.CYCLE_ITERS == 5_000
    assert solved.TEST.EVAL_PERIOD == 100
    assert (solved.DSD.DENSE_ITERS, solved.DSD.SPARSE_ITERS) == (6_000, 3_000)
    assert (solved.REPR.S1, solved.REPR.S2, solved.REPR.N) == (2_000, 1_000, 3)
    assert solved.REPR.WARMUP == 100
    assert solved.REPR.UNIT == "iteration"


def test_resolving_again_changes_nothing_even_for_another_dataset():
    solved = resolve_epochs(cfg_in_epochs(), 1000)
    assert resolve_epochs(solved, 77).dump() == solved.dump()


def test_iterations_stay_as_they_are():
    cfg = small_cfg()
    assert resolve_epochs(cfg, 1000).dump() == cfg.dump()


def test_frozen_stays_frozen():
    cfg = cfg_in_epochs()
    cfg.freeze()
    assert resolve_epochs(cfg, 1000).is_frozen()


def test_lengths_in_epochs_that_cannot_be_are_refused():
    cfg = cfg_in_epochs()
    cfg.REPR.UNIT = "epochs"
    with pytest.raises(ValueError, match="REPR.UNIT is 'epochs'"):
        resolve_epochs(cfg, 1000)
    cfg = cfg_in_epochs()
    cfg.SOLVER.MAX_EPOCHS = -1
    with pytest.raises(ValueError, match="MAX_EPOCHS is -1"):
        resolve_epochs(cfg, 1000)
    cfg.SOLVER.IMS_PER_BATCH = 0
    with pytest.raises(ValueError, match="IMS_PER_BATCH is 0"):
        resolve_epochs(cfg, 1000)
