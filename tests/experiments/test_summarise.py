from __future__ import annotations

from dataclasses import replace

from experiments import summarise
from experiments.summarise import MEASURES, results_page
from experiments.tables import ACCURACY, AP, ERROR, Row, Table
from tests.experiments.settings import squeezed


def table_in_markdown(*arguments):
    return squeezed(summarise.table_in_markdown(*arguments))


ROWS = (
    Row("standard", "Standard", 72.1, "c.yaml"),
    Row("ortho", "Ortho", 76.4, "c.yaml", {}, "standard"),
    Row("ours", "Ours", None, "c.yaml", {}, "standard"),
    Row("wild", "Wild", 70.0, "c.yaml", {}, "standard"),
    Row("later", "Later", 71.25, "c.yaml", {}, "standard"),
)
TABLE = Table("t", "A title", ROWS, ACCURACY, notes=("A note.",))


def record(row, seed, *top1):
    return {"row": row, "seed": seed, "evaluations": {"test": [{"top1": v} for v in top1]}}


RECORDS = [
    record("standard", 0, 66.0),
    record("standard", 1, 67.0),
    record("standard", 2, 65.0),
    record("ortho", 0, 68.0),
    record("ortho", 1, 68.0),
    record("ortho", 2, 67.0),
    record("ours", 1, 66.5),
    record("wild", 0, 50.0) | {"diverged": "Loss became infinite"},
]

EXPECTED = """\
# A title

| | Paper | Ours | Seeds | Paper's gain | Our gain, 95 % interval |
|---|---|---|---|---|---|
| Standard | 72.1 | 66.00 ± 1.00 | 3 | | |
| Ortho | 76.4 | 67.67 ± 0.58 | 3 | +4.3 | +1.67 [+0.23, +3.10] |
| Ours | | 66.50 | 1 | | -0.50 (one seed: no interval) |
| Wild | 70 | diverged | 0 (1 more diverged) | -2.1 | |
| Later | 71.25 | not run | 0 | -0.85 | |

Ours: the mean of a run's last 5 evaluations (the last one where there are fewer); then mean ± \
standard deviation over seeds. Gain: accuracy minus that of standard training with the same seed \
(same initial weights, same data order), in points, so above zero is better; in brackets the \
t-interval of its mean with n - 1 degrees of freedom. A note.
"""


def test_table():
    # By hand: differences 2, 1, 2; mean 5/3, deviation 0.57735; t(2) 4.30265; half width 1.43422.
    assert table_in_markdown(TABLE, False, RECORDS) == EXPECTED


def test_errors_are_printed_as_errors_and_gains_still_mean_better():
    text = table_in_markdown(replace(TABLE, metric=ERROR), False, RECORDS)
    assert "| Standard | 72.1 | 34.00 ± 1.00 | 3 | | |" in text
    assert "| Ortho | 76.4 | 32.33 ± 0.58 | 3 | -4.3 | +1.67 [+0.23, +3.10] |" in text


def test_a_shortened_table_says_so_in_its_heading():
    heading = table_in_markdown(replace(TABLE, quick_images=1234), True, RECORDS).splitlines()[:3]
    assert heading == [
        "# A title (SHORTENED RUNS)",
        "",
        "**Shortened: at most 1,234 training images and a tenth of the length. These numbers only "
        "show that everything runs; they are no result.**",
    ]


def test_tables_without_the_papers_numbers_have_no_columns_for_them():
    rows = tuple(replace(row, paper=None) for row in ROWS[:2])
    lines = table_in_markdown(replace(TABLE, rows=rows), False, RECORDS[:6]).splitlines()
    assert lines[2:6] == [
        "| | Ours | Seeds | Our gain, 95 % interval |",
        "|---|---|---|---|",
        "| Standard | 66.00 ± 1.00 | 3 | |",
        "| Ortho | 67.67 ± 0.58 | 3 | +1.67 [+0.23, +3.10] |",
    ]


def detected(row, seed, *pairs):
    evaluations = [{"AP": ap, "AP50": ap50} for ap, ap50 in pairs]
    return {"row": row, "seed": seed, "evaluations": {"test": evaluations}}


def test_detectors_are_compared_in_ap_and_ap50():
    rows = (Row("standard", "Standard", None, "c.yaml"),)
    rows += (Row("repr", "RePr", None, "c.yaml", {}, "standard"),)
    runs = [
        detected("standard", 0, (5.0, 9.0), (20.0, 40.0)),
        detected("standard", 1, (5.0, 9.0), (22.0, 44.0)),
        detected("repr", 0, (5.0, 9.0), (21.0, 40.0)),
        detected("repr", 1, (5.0, 9.0), (21.0, 44.0)),
    ]
    text = table_in_markdown(Table("t", "A title", rows, AP), False, runs)
    # By hand: differences 1, -1 of AP; deviation 1.41421; t(1) 12.7062; half width 12.7062.
    assert text.splitlines()[2:6] == [
        "| | AP | AP50 | Seeds | Gain in AP, 95 % interval | Gain in AP50, 95 % interval |",
        "|---|---|---|---|---|---|",
        "| Standard | 21.00 ± 1.41 | 42.00 ± 2.83 | 2 | | |",
        "| RePr | 21.00 ± 0.00 | 42.00 ± 2.83 | 2 | +0.00 [-12.71, +12.71] "
        "| +0.00 [+0.00, +0.00] |",
    ]
    assert "at a run's last evaluation" in text


def test_value_of_a_run():
    accuracy = MEASURES[ACCURACY].value
    assert accuracy(record("a", 0, 1, 2, 3, 4, 5, 6)) == 4
    assert accuracy(record("a", 0, 1, 2, 3, 9)) == 9
    assert accuracy(record("a", 0, 1) | {"diverged": "so"}) is None
    # With several test sets, the last is the one.
    both = {"evaluations": {"heldout": [{"top1": 1}], "test": [{"top1": 2}]}}
    assert accuracy(both) == 2
    ap = MEASURES[AP].value
    assert ap(detected("a", 0, *((v, 2 * v) for v in range(7)))) == 6
    assert ap(detected("a", 0, (3, 7)), "AP50") == 7


def correlated(seed, rank, value):
    values = {"rank": rank, "value": value}
    by_place = {"all layers": values, "layer1": {"rank": None, "value": 0.5}}
    return record("standard", seed, 66.0) | {"correlations": {"ortho": by_place}}


def test_correlations():
    table = replace(
        TABLE, rows=ROWS[:1], correlates=True, paper_correlations={"ortho": (0.58, 0.38)}
    )
    other = correlated(0, 0.5, 0.25)
    other["correlations"]["weights"] = other["correlations"].pop("ortho")
    (row,) = (ln for ln in table_in_markdown(table, False, [other]).splitlines() if "weights" in ln)
    assert row == "| weights | | | 0.50 | constant | 0.25 | 0.50 |"
    text = table_in_markdown(table, False, [correlated(0, 0.5, 0.25), correlated(1, 0.7, 0.25)])
    assert (
        text
        == """\
# A title

| | Paper's rank | Paper's value | Rank, all layers | Rank, layer1 | Value, all layers | \
Value, layer1 |
|---|---|---|---|---|---|---|
| ortho | 0.58 | 0.38 | 0.60 ± 0.14 | constant | 0.25 ± 0.00 | 0.50 ± 0.00 |

Rank: Spearman's correlation; value: Pearson's; mean ± standard deviation over 2 seeds. Compare \
the paper's Ortho with the score as it prints it. A note.
"""
    )


def test_the_page_has_recorded_tables_and_their_devices():
    timed = [r | {"wall_seconds": 1800.0, "device": "a CPU"} for r in RECORDS]
    other = replace(TABLE, name="other")
    page = squeezed(results_page([other, TABLE], lambda t: timed if t is TABLE else []))
    assert page.startswith("# Results\n") and page.count("\n## ") == 1
    assert "## A title\n" in page and "| Ortho | 76.4 | 67.67 ± 0.58 | 3 |" in page
    assert "\n\nA note.\n\n`python -m experiments t`; 8 runs, 4.0 hours on a CPU.\n" in page
