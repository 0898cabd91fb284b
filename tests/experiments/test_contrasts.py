"""What the studies found, against numbers by hand."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.contrasts import contrasts, over_grid, study_in_markdown
from experiments.protocol import STANDARD, STUDIES, TEST, Cell, all_cells, choice_cells

T_9, T_2 = 2.262157, 4.302653
"""Student's 97.5 % quantiles, from a table."""


def recorded(study, number):
    """All runs of a study: ``number(cell)`` on the test set; each arm chooses the first value."""
    values = {
        cell: 60.0 - 10 * (cell.arm != STANDARD) - 100 * cell.value
        for setting in STUDIES[study].settings
        for cell in choice_cells(study, setting)
    }
    for cell in all_cells(values):
        if cell.study == study and cell.stage == TEST:
            values[cell] = number(cell)
    return values


def rows_of(text):
    """The cells of the table by label."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {label: rest for label, *rest in cells}


def test_primary_contrast_is_paired_over_seeds_with_its_t_interval():
    gains = [1.0, -2, 3, -1, 0.5, -0.5, 2, -3, 1.5, -1.5]

    def number(cell):
        return 40.0 + 5 * cell.seed + (cell.arm == "repr") * gains[cell.seed - 1]

    values = recorded("finetune", number)
    first, *others = contrasts("finetune", values)
    assert first.primary and first.planned == 10 and not any(c.primary for c in others)
    text = study_in_markdown("finetune", values, "x.png")
    row = rows_of(text)[first.label]
    assert "a look before the end" not in text
    width = T_9 * np.std(gains, ddof=1) / 10**0.5
    assert row[:2] == ["primary", "67.50 ± 15.14"]
    assert row[3] == "10 of 10"
    assert row[4] == f"+0.00 [{-width:+.2f}, {width:+.2f}]"
    assert row[5].startswith("+1.0, -2.0, +3.0, -1.0")


def test_exploration_is_corrected_for_all_that_is_planned():
    values = recorded("noise", lambda cell: 50.0 + (cell.arm == "previous") * (cell.seed - 2))
    text = study_in_markdown("noise", values, "x.png")
    rows = rows_of(text)
    assert [row[0] for row in rows.values()] == ["primary"] * 2 + ["exploration"] * 5
    assert "99.00%" in text
    mean, low, high = (float(n) for n in rows["40: previous (0.001) - standard (0.001)"][4]
                       .replace("[", "").replace("]", "").replace(",", "").split())  # fmt: skip
    t_at_99 = 9.924843  # two degrees of freedom, from a table
    assert (mean, low, high) == pytest.approx((0, -t_at_99 / 3**0.5, t_at_99 / 3**0.5), abs=0.005)
    assert t_at_99 > 2 * T_2


def test_worst_weight_decay_is_taken_for_each_seed():
    def number(cell):
        # Standard training is worst at another decay in every second seed.
        low = 0.001 if cell.seed % 2 else 0.02
        return 50.0 - 9 * (cell.value == low) * (cell.arm == STANDARD) - cell.value

    _, worst, *_ = contrasts("noise", recorded("noise", number))
    assert "worst" in worst.label and worst.primary
    for seed, value in worst.standard.items():
        assert value == pytest.approx(41 - (0.001 if seed % 2 else 0.02))
    assert set(worst.arm.values()) == {50 - 0.02} and len(worst.arm) == 10


def test_seed_whose_grid_is_not_whole_has_no_worst():
    values = recorded("noise", lambda cell: 50.0)
    del values[Cell("noise", TEST, "40", STANDARD, 0.003, 4)]
    _, worst, *_ = contrasts("noise", values)
    assert worst.standard.keys() == set(range(1, 11)) - {4}


def test_failed_run_is_left_out_with_its_pair():
    values = recorded("finetune", lambda cell: 40.0 + cell.seed + 3 * (cell.arm == "repr"))
    values[Cell("finetune", TEST, "252-600", STANDARD, 0.0005, 7)] = None
    text = study_in_markdown("finetune", values, "x.png")
    row = next(iter(rows_of(text).values()))
    assert row[3] == "9 of 10" and row[4] == "+3.00 [+3.00, +3.00]"
    assert "a look before the end: nothing is claimed" in text


def test_nothing_is_said_of_the_test_set_before_it_is_looked_at():
    values = {
        cell: 50.0 for setting in ("40", "0") for cell in choice_cells("noise", setting)
    }  # fmt: skip
    text = study_in_markdown("noise", values, "x.png")
    assert "No pair is recorded on `cifar10_test` yet." in text and not rows_of(text)


def test_picture_shows_the_recorded_values_of_each_arm():
    cells = choice_cells("finetune", "252-600")
    values = {cell: 20.0 + number for number, cell in enumerate(cells)}
    missing = Cell("finetune", "choice", "252-600", "repr", 0.001)
    del values[missing]
    (axes,) = over_grid("finetune", values).axes
    drawn = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert drawn == {
        arm: {c.value: values[c] for c in cells if c.arm == arm and c != missing}
        for arm in STUDIES["finetune"].settings["252-600"].arms
    }
