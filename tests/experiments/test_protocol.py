from __future__ import annotations

import pytest

from experiments.protocol import (
    CHOICE,
    STANDARD,
    STUDIES,
    TEN_SEEDS,
    THREE_SEEDS,
    Cell,
    all_cells,
    best_repr,
    cells_on_test_set,
    choice_cells,
    chosen,
    next_cell,
)
from experiments.run_studies import run_of

NOISE = [("noise", "40"), ("noise", "0")]
FINETUNE = [("finetune", "252-600"), ("finetune", "126-900"), ("finetune", "252-1800")]


def choices(study, setting, values):
    """Every choice recorded as 50, but for what is given by arm and value of the grid."""
    return {c: values.get((c.arm, c.value), 50.0) for c in choice_cells(study, setting)}


def test_every_arm_takes_its_own_best_value():
    best = {
        (STANDARD, 0.002): 60.0,
        ("repr", 0.0005): 55.0,
        ("previous-7", 0.001): 58.0,
    }
    values = choices("finetune", "252-600", best)
    found = chosen("finetune", "252-600", values)
    assert [found[arm].value for arm in found] == [0.002, 0.0005, 0.0005, 0.0005, 0.001]
    assert best_repr(found, values) == "previous-7"
    found = cells_on_test_set("finetune", "252-600", values, "primary")
    assert {(c.arm, c.value) for c in found} == {(STANDARD, 0.002), ("previous-7", 0.001)}
    assert sorted(c.seed for c in found) == sorted(TEN_SEEDS * 2)
    others = cells_on_test_set("finetune", "252-600", values, "others")
    assert {c.arm for c in others} == {"repr", "repr-heads", "previous-3"}
    assert {c.seed for c in others} == set(THREE_SEEDS)


def test_of_equal_values_the_first_is_chosen():
    values = choices("noise", "40", {})
    found = chosen("noise", "40", values)
    assert {cell.value for cell in found.values()} == {0.001}
    assert best_repr(found, values) == "repr"


def test_nothing_is_chosen_before_all_is_recorded():
    values = choices("noise", "40", {})
    del values[choice_cells("noise", "40")[-1]]
    assert chosen("noise", "40", values) is None
    assert cells_on_test_set("noise", "40", values, "primary") == []


def test_failed_runs_are_not_chosen():
    decays = STUDIES["noise"].grid
    failed = {("repr", decay): None for decay in decays} | {(STANDARD, 0.001): None}
    values = choices("noise", "40", failed)
    found = chosen("noise", "40", values)
    assert list(found) == [STANDARD, "repr-50", "previous"]
    assert found[STANDARD].value == 0.003
    assert best_repr(found, values) == "repr-50"


def test_grid_is_run_by_the_arms_of_the_primary_contrast():
    values = choices("noise", "40", {(STANDARD, 0.01): 60.0, ("previous", 0.005): 59.0})
    grid = cells_on_test_set("noise", "40", values, "grid")
    primary = cells_on_test_set("noise", "40", values, "primary")
    pairs = {(c.arm, c.value, c.seed) for c in grid + primary}
    assert len(grid + primary) == len(pairs) == 2 * 5 * 10
    assert {arm for arm, _, _ in pairs} == {STANDARD, "previous"}


def test_nothing_of_the_test_set_enters_a_choice():
    values = {c: 50.0 for study, setting in NOISE + FINETUNE for c in choice_cells(study, setting)}
    before = all_cells(values)
    on_test = [cell for cell in before if cell.stage != CHOICE]
    values |= {cell: float(number) for number, cell in enumerate(on_test)}
    assert all_cells(values) == before
    # Nothing twice, and as many as PROTOCOL.md says.
    assert len(set(before)) == len(before) == 45 + 40 + 20 + 20 + 9 + 6 + 15 + 12 + 80 + 15


def test_both_studies_come_early_and_failed_runs_last():
    first = next_cell({}, lambda cell: 0)
    second = next_cell({first: 1.0}, lambda cell: 0)
    assert {first.study, second.study} == {"finetune", "noise"}
    assert next_cell({}, lambda cell: int(cell == first)) == second
    values = {}
    while (cell := next_cell(values, lambda cell: int(cell == first))) != first:
        values[cell] = 1.0
    assert [c for c in all_cells(values) if c not in values] == [first]


def test_all_cycles_end_before_the_first_drop_of_the_rate():
    for study, settings in (("finetune", FINETUNE), ("noise", NOISE)):
        for _, name in settings:
            setting = STUDIES[study].settings[name]
            drop = 32 if study == "noise" else setting.overrides["SOLVER.STEPS"][0]
            for arm, of in setting.arms.items():
                if arm != STANDARD:
                    assert of["REPR.N"] * (of["REPR.S1"] + of["REPR.S2"]) < drop


@pytest.mark.parametrize("study, setting", [("noise", "40"), ("finetune", "126-900")])
def test_runs_of_a_seed_differ_in_repr_keys_alone(study, setting, tmp_path, needed):
    cells = choice_cells(study, setting)[: len(STUDIES[study].settings[setting].arms)]
    configs = [run_of(cell, tmp_path).resolved for cell in cells]
    assert (0.4 if study == "noise" else 0.0) == configs[0].DATASETS.RANDOM_LABELS
    seeded = run_of(Cell(study, "test", setting, STANDARD, cells[0].value, 7), tmp_path).resolved
    assert seeded.SEED == seeded.REPR.SEED == 7
    assert (7 if study == "noise" else 0) == seeded.DATASETS.RANDOM_LABELS_SEED
    assert seeded.DATASETS.TEST[0].endswith("_test")
    for cfg in configs:
        cfg.REPR, cfg.OUTPUT_DIR = configs[0].REPR, ""
        assert cfg == configs[0]
