"""A table's runs over time, from records alone."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from matplotlib.colors import to_hex

from experiments.summarise import over_time
from experiments.tables import ACCURACY, AP, Row, Table
from repr_det.report import plots
from repr_det.report.plots import REPR, STANDARD

COLOURS = plots.colours([STANDARD, REPR])

ROWS = (
    Row("standard", "Standard", None, "c.yaml"),
    Row("ortho", "Ortho", None, "c.yaml", {}, "standard"),
    Row("random", "Random", None, "c.yaml", {}, "standard"),
)
TABLE = Table("t", "A title", ROWS)


def record(row, seed, values, name="top1", **repr_keys):
    """Batches of 8 of 80 images: 10 iterations an epoch, an evaluation every 20."""
    keys = {"ENABLED": row != "standard", "S1": 20, "S2": 10, "N": 2, **repr_keys}
    solver = {"IMS_PER_BATCH": 8, "MAX_ITER": 100, "STEPS": [80, 100]}
    solver["LR_SCHEDULER_NAME"] = "WarmupMultiStepLR"
    return {
        "row": row,
        "seed": seed,
        "training_images": 80,
        "settings": {"SOLVER": solver, "REPR": keys},
        "evaluations": {"test": [{"iteration": 20 * n, name: v} for n, v in enumerate(values, 1)]},
    }


def lines_of(axes):
    return {
        line.get_label(): (line.get_xdata(), line.get_ydata(), to_hex(line.get_color()))
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def test_means_and_spread_over_the_seeds_of_a_pair():
    runs = [
        record("standard", 0, [10, 20, 30]),
        record("standard", 1, [20, 40, 60]),
        record("standard", 2, [99, 99, 99]),  # has no partner
        record("ortho", 0, [1, 2, 3, 4]),  # was evaluated once more
        record("ortho", 1, [3, 4, 5]),
        record("ortho", 3, [0]) | {"diverged": "so"},
    ]
    figure = over_time(TABLE, runs)
    (axes,) = figure.axes
    found = lines_of(axes)
    assert list(found) == ["Standard", "Ortho"]
    for label, side, values in (
        ("Standard", STANDARD, [(10, 20), (20, 40), (30, 60)]),
        ("Ortho", REPR, [(1, 3), (2, 4), (3, 5)]),
    ):
        x, y, colour = found[label]
        assert list(x) == [2, 4, 6] and colour == COLOURS[side]
        assert list(y) == [statistics.mean(pair) for pair in values]
    spread = axes.collections[0].get_paths()[0].vertices
    at_four = spread[spread[:, 0] == 4, 1]
    assert np.allclose(sorted({*at_four.round(6)}), [30 - 200**0.5, 30 + 200**0.5])
    assert [(p.get_x(), p.get_width()) for p in axes.patches] == [(2, 1), (5, 1)]
    assert [*axes.lines[0].get_xdata()] == [8, 8]  # the second fall is the end
    assert axes.get_xlabel() == "epoch; means over 2 seeds"
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == ["S2: filters dropped", "± standard deviation", "learning rate falls"]


def test_a_panel_for_each_row_with_its_own_cycles():
    runs = [
        record("standard", 0, [1, 2]),
        record("ortho", 0, [1, 2]),
        record("random", 0, [1, 2], S2=30, N=1),
    ]
    first, second = over_time(TABLE, runs).axes
    assert list(lines_of(first)) == ["Standard", "Ortho"]
    assert list(lines_of(second)) == ["Standard", "Random"]
    assert [(p.get_x(), p.get_width()) for p in second.patches] == [(2, 3)]
    assert second.get_xlabel() == "epoch; one seed"
    assert first.get_ylabel() == "top-1 accuracy, %"


def test_detectors_over_iterations():
    table = Table("t", "A title", ROWS[:2], AP)
    runs = [record(row, 0, [5, 8], "AP") for row in ("standard", "ortho")]
    (axes,) = over_time(table, runs).axes
    assert list(lines_of(axes)["Ortho"][0]) == [20, 40]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("iteration; one seed", "AP of boxes, %")


def test_nothing_to_compare():
    assert TABLE.metric == ACCURACY
    with pytest.raises(ValueError, match="Table t has no row that is recorded together with its"):
        over_time(TABLE, [record("standard", 0, [1]), record("ortho", 1, [1])])
