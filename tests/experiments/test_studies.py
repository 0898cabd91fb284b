"""The studies can be trained, and choose nothing on test data."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model

from experiments.protocol import CHOICE, CHOICE_SEED, Cell
from experiments.run_studies import run_of
from experiments.runs import FULL, QUICK, differences, plan, row_cfg, settings_of
from experiments.tables import AP, STUDIES
from repr_det import RePr, RePrSchedule
from repr_det.classification import resolve_epochs
from repr_det.tasks import DETECTION, task_of
from tests.classification.settings import needs_cifar10

ROWS = [(table, row) for table in STUDIES.values() for row in table.rows]


@pytest.mark.parametrize(("table", "row"), ROWS, ids=lambda x: x.name)
def test_row(table, row):
    cfg = row_cfg(row, 3)
    task = task_of(cfg)
    assert (table.metric == AP) == (task == DETECTION)
    resolved = cfg if task == DETECTION else resolve_epochs(cfg, 50_000 - cfg.DATASETS.HELD_OUT)
    if cfg.REPR.ENABLED:
        schedule = RePrSchedule(resolved.REPR.S1, resolved.REPR.S2, resolved.REPR.N)
        schedule.check_fits(resolved.SOLVER.MAX_ITER)
        # Two rows look at a late return, and the authors' rate falls all the time.
        if row.name != "late" and table.name != "authors":
            assert schedule.end < resolved.SOLVER.STEPS[0]
        standard = row_cfg(table.row(row.standard), 3)
        changed = differences(settings_of(standard), settings_of(cfg))
        assert changed and all(key.startswith("REPR.") for key in changed), changed
    else:
        assert row.standard is None


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for _, row in ROWS if row.standard], ids=lambda row: row.name)
def test_network_can_do_what_a_row_asks_of_it(row):
    cfg = row_cfg(row, 3)
    if task_of(cfg) != DETECTION:
        cfg = resolve_epochs(cfg, 50_000 - cfg.DATASETS.HELD_OUT)
    model = build_model(cfg)
    method = RePr(
        model,
        torch.optim.SGD(model.parameters(), cfg.SOLVER.BASE_LR),
        RePrSchedule(cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N),
        cfg.REPR.PRUNE_RATIO,
        include=cfg.REPR.INCLUDE,
        max_layer_ratio=cfg.REPR.MAX_LAYER_RATIO,
        warmup=cfg.REPR.WARMUP,
    )
    assert method.layers


@pytest.mark.parametrize("name", ["screening", "noise-gain"])
def test_searches_look_at_no_test_image(name):
    table = STUDIES[name]
    assert {row_cfg(row, 0).DATASETS.TEST for row in table.rows} == {("cifar10_heldout",)}
    assert {row_cfg(row, 0).DATASETS.HELD_OUT for row in table.rows} == {30_000}


@needs_cifar10
@pytest.mark.parametrize(
    ("row", "arm"),
    [
        ("standard", "standard"),
        ("previous", "previous"),
        ("ortho", "repr"),
        ("ortho-50", "repr-50"),
    ],
)
def test_search_after_study_noise_trains_as_the_study_did(row, arm, tmp_path):
    """Seed 0 chose there, with random labels of that seed."""
    table = STUDIES["noise-gain"]
    found = plan(table, table.row(row), CHOICE_SEED, FULL, tmp_path).cfg
    wanted = run_of(Cell("noise", CHOICE, "40", arm, 0.001), tmp_path).cfg
    changed = differences(settings_of(wanted), settings_of(found))
    assert wanted.REPR.ENABLED == found.REPR.ENABLED
    # Standard training reads no other key of RePr's.
    assert [k for k in changed if found.REPR.ENABLED or not k.startswith("REPR.")] == []


@needs_cifar10
def test_screening_can_be_shortened(tmp_path):
    """Fewer training images, judged on those that are held out."""
    table = STUDIES["screening"]
    run = plan(table, table.rows[0], 0, QUICK, tmp_path)
    assert run.images == 3000 and run.cfg.DATASETS.TEST == ("cifar10_heldout",)
    assert run.max_iter == 188  # a tenth of 40 epochs, in batches of 64
