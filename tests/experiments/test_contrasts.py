"""What the studies found, against numbers by hand."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.contrasts import (
    again_in_markdown,
    choice_tables,
    contrasts,
    over_grid,
    study_in_markdown,
)
from experiments.protocol import CHOICE, STANDARD, STUDIES, TEST, Cell, all_cells, choice_cells
from experiments.run_studies import AGAIN, record_path
from experiments.runs import write_record
from experiments.tables import AP
from repr_det.report.plots import ARM_COLOURS

T_9 = 2.262157
"""Student's 97.5 % quantile with nine degrees of freedom, from a table."""


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
    assert row[5] == "95 %" and row[6].startswith("+1.0, -2.0, +3.0, -1.0")


def test_exploration_is_corrected_for_all_that_is_planned():
    values = recorded("noise", lambda cell: 50.0 + (cell.arm == "previous") * (cell.seed - 2))
    text = study_in_markdown("noise", values, "x.png")
    rows = rows_of(text)
    # Five arms over three seeds, and the best arm at the four weight decays that were not chosen.
    assert [row[0] for row in rows.values()] == ["primary"] * 2 + ["exploration"] * 9
    assert "nothing is claimed from it" in text and "correction for 9 of them" in text
    assert [row[5] for row in rows.values()] == ["95 %"] * 2 + ["99.44 %"] * 9
    mean, low, high = (float(n) for n in rows["40: previous (0.001) - standard (0.001)"][4]
                       .replace("[", "").replace("]", "").replace(",", "").split())  # fmt: skip
    # Student's quantile with two degrees of freedom has a closed form.
    q = 1 - 0.05 / 9 / 2
    t = (2 * q - 1) * (2 / (4 * q * (1 - q))) ** 0.5
    assert (mean, low, high) == pytest.approx((0, -t / 3**0.5, t / 3**0.5), abs=0.005)


def test_best_arm_is_compared_at_each_weight_decay_that_was_not_chosen():
    values = recorded("noise", lambda c: 50.0 + c.seed + (c.arm == "repr") * 100 * c.value)
    rows = rows_of(study_in_markdown("noise", values, "x.png"))
    for value in (0.003, 0.005, 0.01, 0.02):
        row = rows[f"40: repr - standard, weight decay {value:g}"]
        gain = f"{100 * value:+.2f}"
        assert row[0] == "exploration" and row[3] == "10 of 10"
        assert row[4] == f"{gain} [{gain}, {gain}]"
    assert "40: repr - standard, weight decay 0.001" not in rows


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


def test_primary_contrast_that_waits_for_its_first_pair_is_named():
    values = recorded("noise", lambda cell: 50.0)
    first, worst, *_ = contrasts("noise", values)
    whole = study_in_markdown("noise", values, "x.png")
    of_grid = [c for c in values if c.stage == TEST and c.value == 0.003]
    text = study_in_markdown(
        "noise", {c: v for c, v in values.items() if c not in of_grid}, "x.png"
    )
    waits = f"Primary and without a pair yet: {worst.label}."
    assert waits in text and waits not in whole
    assert first.label in rows_of(text) and worst.label not in rows_of(text)


def test_failed_run_is_named_and_left_out_with_its_pair():
    values = recorded("finetune", lambda cell: 40.0 + cell.seed + 3 * (cell.arm == "repr"))
    failed = Cell("finetune", TEST, "252-600", STANDARD, 0.0005, 7)
    values[failed] = None
    text = study_in_markdown("finetune", values, "x.png")
    row = next(iter(rows_of(text).values()))
    assert row[3] == "9 of 10" and row[4] == "+3.00 [+3.00, +3.00]"
    assert "before the end" not in text  # it is recorded as failed
    assert f"Failed twice, and left out with their pairs: {failed}." in text


def test_a_look_before_the_end_says_so():
    values = recorded("finetune", lambda cell: 40.0)
    assert "before the end" not in study_in_markdown("finetune", values, "x.png")
    del values[Cell("finetune", TEST, "252-600", STANDARD, 0.0005, 7)]
    text = study_in_markdown("finetune", values, "x.png")
    assert "this is a look before the end: nothing is claimed" in text


def test_diverged_run_counts_as_the_protocol_says_and_is_named():
    values = recorded("finetune", lambda cell: 40.0)
    diverged = Cell("finetune", TEST, "252-600", "repr", 0.0005, 3)
    values[diverged] = 0.0
    text = study_in_markdown("finetune", values, "x.png")
    row = next(iter(rows_of(text).values()))
    assert row[3] == "10 of 10" and row[4].startswith("-4.00 [")
    assert f"Counted as 0 %, as runs that diverge are: {diverged}." in text


def test_choice_compares_arms_at_the_same_value_in_the_order_of_the_protocol():
    cells = choice_cells("finetune", "252-600")
    (table,) = choice_tables(dict.fromkeys(cells[:7], 1.0))
    assert (table.name, table.metric) == ("finetune-choice", AP)
    assert {row.name: row.standard for row in table.rows} == {
        "252-600-standard-0.0005": None,
        "252-600-repr-0.0005": "252-600-standard-0.0005",
        "252-600-repr-heads-0.0005": "252-600-standard-0.0005",
        "252-600-previous-3-0.0005": "252-600-standard-0.0005",
        "252-600-previous-7-0.0005": "252-600-standard-0.0005",
        "252-600-standard-0.001": None,
        "252-600-repr-0.001": "252-600-standard-0.001",
    }
    assert choice_tables({}) == []


def test_nothing_is_said_of_the_test_set_before_it_is_looked_at():
    values = {
        cell: 50.0 for setting in ("40", "0") for cell in choice_cells("noise", setting)
    }  # fmt: skip
    text = study_in_markdown("noise", values, "x.png")
    assert "No pair is recorded on `cifar10_test` yet." in text and not rows_of(text)


def test_picture_shows_the_recorded_values_of_each_arm():
    cells = choice_cells("finetune", "252-600")
    values = {cell: 20.0 + number for number, cell in enumerate(cells)}
    missing = Cell("finetune", CHOICE, "252-600", "repr", 0.001)
    values[missing] = None
    for cell in cells:
        if cell.arm == STANDARD:
            del values[cell]
    (axes,) = over_grid("finetune", values).axes
    drawn = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert drawn.keys() == {"repr", "repr-heads", "previous-3", "previous-7"}
    assert np.isnan(drawn["repr"].pop(0.001))
    for arm, points in drawn.items():
        assert points == {c.value: values[c] for c in cells if c.arm == arm and c != missing}
    # The first colour stays that of standard training.
    assert [line.get_color() for line in axes.lines] == list(ARM_COLOURS[1:5])
    assert over_grid("finetune", dict.fromkeys(cells)).axes[0].lines[:] == []


def test_a_run_that_was_trained_again_is_compared_with_its_record(tmp_path):
    assert again_in_markdown(tmp_path) == ""
    cell = Cell("finetune", TEST, "252-600", "previous-3", 0.001, 1)
    for folder, number, commit in ((tmp_path, 22.5, "a" * 40), (tmp_path / AGAIN, 22.25, "b" * 40)):
        record = {
            **{"cell": vars(cell), "commit": commit, "device": "a processor"},
            "evaluations": {"neu_det_test": [{"AP": 1.0}, {"AP": number}]},
        }
        write_record(record_path(cell, folder), record)
    (row,) = rows_of(again_in_markdown(tmp_path)).values()
    assert row == ["22.5000", "22.2500", "-0.2500", "`aaaaaaa`, `bbbbbbb`", "a processor"]
