"""The shipped tables are complete, and every row of them could be trained."""

from __future__ import annotations

import pytest

from experiments.runs import _differences, _settings, row_cfg
from experiments.tables import ACCURACY, ERROR, TABLES, Row, only
from repr_det import RePrSchedule
from repr_det.classification import classifier_names, resolve_epochs
from repr_det.errors import UserError
from repr_det.method.criteria import CRITERIA

IMAGES = {"cifar10_train": 50_000, "cifar100_train": 50_000, "imagenet_train": 1_281_167}
ROWS = [(table, row) for table in TABLES.values() for row in table.rows]
NAMES = (
    "criteria orthogonality-loss distillation schemes depth resnet densenet imagenet "
    "percent-pruned cycles s1-s2 optimizers lr-schedules dropout oracle-correlation"
)


def test_all_tables_are_there():
    assert list(TABLES) == NAMES.split()
    for table in TABLES.values():
        assert table.metric in (ACCURACY, ERROR)
        names = [row.name for row in table.rows]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(("table", "row"), ROWS, ids=lambda x: x.name)
def test_row(table, row):
    cfg = row_cfg(row, 7)
    assert cfg.SEED == 7
    images = IMAGES[cfg.DATASETS.TRAIN[0]] - cfg.DATASETS.HELD_OUT
    if "cifar" in cfg.DATASETS.TRAIN[0]:
        assert images == 45_000
    assert len(cfg.DATASETS.TEST) == 1
    assert cfg.MODEL.CLASSIFIER.NAME in classifier_names()
    resolved = resolve_epochs(cfg, images)
    if cfg.REPR.ENABLED:
        assert cfg.REPR.CRITERION in CRITERIA
        assert cfg.REPR.PRUNE_RATIO <= cfg.REPR.MAX_LAYER_RATIO
        schedule = RePrSchedule(resolved.REPR.S1, resolved.REPR.S2, resolved.REPR.N)
        schedule.check_fits(resolved.SOLVER.MAX_ITER)
        if resolved.SOLVER.STEPS:
            assert schedule.end < resolved.SOLVER.STEPS[0]
    # Whatever a row needs stands before it.
    before = [other.name for other in table.rows[: table.rows.index(row)]]
    assert {row.standard, row.teacher} - {None} <= set(before)
    assert bool(row.teacher) == bool(cfg.DISTILL.TEACHER)
    if row.teacher:
        teacher = row_cfg(table.row(row.teacher), 7)
        assert teacher.MODEL.CLASSIFIER.NAME == cfg.DISTILL.TEACHER
        assert teacher.DATASETS.TRAIN == cfg.DATASETS.TRAIN


@pytest.mark.parametrize(("table", "row"), [p for p in ROWS if p[1].standard], ids=lambda x: x.name)
def test_row_and_its_standard_differ_only_in_the_method(table, row):
    standard, cfg = row_cfg(table.row(row.standard), 0), row_cfg(row, 0)
    assert not standard.REPR.ENABLED
    changed = _differences(_settings(standard), _settings(cfg))
    # DSD is not trained with RePr, and neither are OL and KD alone.
    allowed = ("REPR.", "DISTILL.", "DSD.", "MODEL.CLASSIFIER.ORTHO_LOSS")
    assert changed and all(key.startswith(allowed) for key in changed), changed


@pytest.mark.parametrize(
    ("table", "name", "config"),
    [
        ("criteria", "ortho", "cifar10_c3_32.yaml"),
        ("criteria", "standard", "cifar10_c3_32_standard.yaml"),
        ("orthogonality-loss", "cifar10-ol", "cifar10_c3_32_ortho_loss.yaml"),
        ("orthogonality-loss", "cifar10-repr-ol", "cifar10_c3_32_repr_ortho_loss.yaml"),
        ("distillation", "cifar10-kd", "cifar10_c3_32_distill.yaml"),
        ("distillation", "cifar10-kd-repr", "cifar10_c3_32_repr_distill.yaml"),
        ("depth", "cifar10-3-repr", "cifar10_c3_32_bn.yaml"),
        ("depth", "cifar10-3-standard", "cifar10_c3_32_bn_standard.yaml"),
        ("densenet", "cifar100-40-standard", "cifar100_densenet40_standard.yaml"),
        ("imagenet", "resnet50-standard", "imagenet_resnet50_standard.yaml"),
        ("imagenet", "resnet50-n3", "imagenet_resnet50.yaml"),
        ("optimizers", "adam-repr", "cifar10_c3_32_adam.yaml"),
    ],
)
def test_rows_are_the_named_configs_on_45000_images(table, name, config):
    shipped = _settings(row_cfg(Row("", "", None, config), 0))
    found = _settings(row_cfg(TABLES[table].row(name), 0))
    expected = {} if table == "imagenet" else {"DATASETS.HELD_OUT": 5000}
    assert _differences(shipped, found) == expected


def test_the_papers_numbers():
    """Some of each table, and the gains that the paper's text names."""
    criteria = {row.label: row.paper for row in TABLES["criteria"].rows}
    assert criteria == {
        "Standard": 72.1, "Random": 73.4, "Activations": 74.1, "APoZ": 74.3, "Gradients": 74.3,
        "Taylor": 74.3, "Hessian": 74.4, "Weights": 74.6, "Oracle": 76.0, "Ortho": 76.4,
    }  # fmt: skip
    assert TABLES["schemes"].row("repr-ortho").paper == 6.9
    assert TABLES["distillation"].row("cifar100-kd-repr").paper == 64.1
    assert TABLES["orthogonality-loss"].row("cifar10-repr-ol").paper == 76.7
    assert TABLES["depth"].row("cifar10-18-repr").paper == 22.5
    assert TABLES["resnet"].row("cifar100-110-standard").paper == 27.5
    assert TABLES["densenet"].row("cifar10-100-repr").paper == 5.6
    assert TABLES["imagenet"].row("bn_inception-n2").paper == 26.95


def test_only_some_rows_and_what_they_need():
    table = TABLES["distillation"]
    assert [row.name for row in only(table, ["cifar10-kd*"]).rows] == [
        "cifar10-teacher", "cifar10-standard", "cifar10-kd", "cifar10-kd-repr",
    ]  # fmt: skip
    assert only(table, []) is table
    with pytest.raises(UserError, match="distillation has no row 'kd': give some of cifar10-"):
        only(table, ["kd"])
    with pytest.raises(UserError, match="no row 'kd'"):
        table.row("kd")


def test_a_standard_row_has_no_standard():
    for table in TABLES.values():
        for row in table.rows:
            if row.standard:
                assert table.row(row.standard).standard is None
