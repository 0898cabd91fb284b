"""The shipped tables are complete, and every row of them could be trained."""

from __future__ import annotations

import pytest

from experiments.runs import differences, row_cfg, settings_of
from experiments.tables import ACCURACY, ERROR, PAPER, only, read_tables
from repr_det import RePrSchedule
from repr_det.classification import classifier_names, resolve_epochs
from repr_det.errors import UserError
from repr_det.method.criteria import CRITERIA

IMAGES = {"cifar10_train": 50_000, "cifar100_train": 50_000, "imagenet_train": 1_281_167}
ROWS = [(table, row) for table in PAPER.values() for row in table.rows]
NAMES = (
    "criteria orthogonality-loss distillation schemes depth resnet densenet imagenet "
    "percent-pruned cycles s1-s2 optimizers lr-schedules dropout oracle-correlation"
)


def test_all_tables_are_there():
    assert list(PAPER) == NAMES.split()
    for table in PAPER.values():
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
    changed = differences(settings_of(standard), settings_of(cfg))
    # DSD is not trained with RePr, and neither are OL and KD alone.
    allowed = ("REPR.", "DISTILL.", "DSD.", "MODEL.CLASSIFIER.ORTHO_LOSS")
    assert changed and all(key.startswith(allowed) for key in changed), changed


def test_rows_of_a_file(tmp_path):
    """Defaults of the table, pairs, and what a row is compared with."""
    path = tmp_path / "tables.yaml"
    path.write_text(
        """
t:
  title: A title
  notes: [A note.]
  config: a.yaml
  overrides: {X: 1, Y: [1, 2]}
  rows:
    standard: {label: Standard, paper: 70.5, overrides: {REPR.ENABLED: false}}
    one: {label: One, overrides: {X: 2}}
    alone: {label: Alone, standard: null, config: b.yaml}
    0.25: {pair: Both, paper: [3, 4], overrides: {X: 3}}
"""
    )
    table = read_tables(path)["t"]
    assert (table.name, table.title, table.metric, table.notes) == (
        "t", "A title", ACCURACY, ("A note.",),
    )  # fmt: skip
    found = [(row.name, row.label, row.paper, row.config, row.standard) for row in table.rows]
    assert found == [
        ("standard", "Standard", 70.5, "a.yaml", None),
        ("one", "One", None, "a.yaml", "standard"),
        ("alone", "Alone", None, "b.yaml", None),
        ("0.25-standard", "Both", 3, "a.yaml", None),
        ("0.25-repr", "Both, RePr", 4, "a.yaml", "0.25-standard"),
    ]
    assert [row.overrides for row in table.rows] == [
        {"X": 1, "Y": [1, 2], "REPR.ENABLED": False},
        {"X": 2, "Y": [1, 2]},
        {"X": 1, "Y": [1, 2]},
        {"X": 3, "Y": [1, 2], "REPR.ENABLED": False},
        {"X": 3, "Y": [1, 2]},
    ]


def test_the_papers_numbers():
    """Some of each table, and the gains that the paper's text names."""
    criteria = {row.label: row.paper for row in PAPER["criteria"].rows}
    assert criteria == {
        "Standard": 72.1, "Random": 73.4, "Activations": 74.1, "APoZ": 74.3, "Gradients": 74.3,
        "Taylor": 74.3, "Hessian": 74.4, "Weights": 74.6, "Oracle": 76.0, "Ortho": 76.4,
    }  # fmt: skip
    assert PAPER["schemes"].row("repr-ortho").paper == 6.9
    assert PAPER["distillation"].row("cifar100-kd-repr").paper == 64.1
    assert PAPER["orthogonality-loss"].row("cifar10-repr-ol").paper == 76.7
    assert PAPER["depth"].row("cifar10-18-repr").paper == 22.5
    assert PAPER["resnet"].row("cifar100-110-standard").paper == 27.5
    assert PAPER["densenet"].row("cifar10-100-repr").paper == 5.6
    assert PAPER["imagenet"].row("bn_inception-n2").paper == 26.95


def test_only_some_rows_and_what_they_need():
    table = PAPER["distillation"]
    assert [row.name for row in only(table, ["cifar10-kd*"]).rows] == [
        "cifar10-teacher", "cifar10-standard", "cifar10-kd", "cifar10-kd-repr",
    ]  # fmt: skip
    assert only(table, []) is table
    with pytest.raises(UserError, match="distillation has no row 'kd'. Set some of cifar10-"):
        only(table, ["kd"])
    with pytest.raises(UserError, match="no row 'kd'"):
        table.row("kd")


def test_a_standard_row_has_no_standard():
    for table in PAPER.values():
        for row in table.rows:
            if row.standard:
                assert table.row(row.standard).standard is None
