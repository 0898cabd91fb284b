"""Records of runs as a table in Markdown, the paper's numbers beside ours."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from repr_det.analysis.correlation import EVERYWHERE
from repr_det.analysis.statistics import Estimate, estimate, paired_difference
from repr_det.analysis.tables import ERROR, Row, Table

LAST = 5
"""A run's accuracy is the mean of so many last evaluations."""

Record = dict[str, Any]


def run_accuracy(record: Record) -> float | None:
    """Top-1 accuracy of a run in per cent: the mean of its last :data:`LAST` evaluations.

    The last one alone where there are fewer; None for a run that diverged.
    """
    if "diverged" in record:
        return None
    evaluations = list(record["evaluations"].values())[-1]
    last = evaluations[-LAST:] if len(evaluations) >= LAST else evaluations[-1:]
    return statistics.fmean(entry["top1"] for entry in last)


def table_in_markdown(table: Table, shortened: bool, records: Sequence[Record]) -> str:
    """A table with its heading and caption.

    Args:
        table: its rows.
        shortened: the records are of shortened runs.
        records: of any rows and seeds of this table.
    """
    heading = f"# {table.title}\n"
    if shortened:
        heading = (
            f"# {table.title} (SHORTENED RUNS)\n\n"
            f"**Shortened: at most {table.quick_images:,} training images and a tenth of the "
            "epochs. These numbers only show that everything runs; they cannot be compared with "
            "the paper's.**\n"
        )
    body = _correlations(table, records) if table.correlates else _accuracies(table, records)
    return f"{heading}\n{body}"


def _accuracies(table: Table, records: Sequence[Record]) -> str:
    by_row: dict[str, dict[int, float]] = {row.name: {} for row in table.rows}
    diverged = dict.fromkeys(by_row, 0)
    for record in records:
        accuracy = run_accuracy(record)
        if accuracy is None:
            diverged[record["row"]] += 1
        else:
            by_row[record["row"]][record["seed"]] = accuracy
    lines = [
        "| | Paper | Ours | Seeds | Paper's gain | Our gain, 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    for row in table.rows:
        accuracies = by_row[row.name]
        ours = "not run"
        if accuracies:
            values = accuracies.values()
            ours = _spread(estimate([100 - v if table.metric == ERROR else v for v in values]))
        seeds = str(len(accuracies))
        if diverged[row.name]:
            seeds += f" ({diverged[row.name]} more diverged)"
        gain = None
        if row.standard:
            gain = paired_difference(accuracies, by_row[row.standard])
        cells = [row.label, _number(row.paper), ours, seeds, _paper_gain(table, row), _gain(gain)]
        lines.append(_line(cells))
    caption = (
        f"Ours: the mean of a run's last {LAST} evaluations (the last one where there are fewer); "
        "then mean ± standard deviation over seeds. Gain: accuracy minus that of standard "
        "training with the same seed (same initial weights, same data order), in points, so above "
        "zero is better; in brackets the t-interval of its mean with n - 1 degrees of freedom."
    )
    return "\n".join([*lines, "", " ".join([caption, *table.notes]), ""])


def _correlations(table: Table, records: Sequence[Record]) -> str:
    found = [record["correlations"] for record in records if "correlations" in record]
    places = list(next(iter(found[0].values()))) if found else [EVERYWHERE]
    kinds = [(kind, place) for kind in ("rank", "value") for place in places]
    titles = [f"{kind.capitalize()}, {place}" for kind, place in kinds]
    lines = [
        _line(["", "Paper's rank", "Paper's value", *titles]),
        "|---" * (3 + len(titles)) + "|",
    ]
    for criterion in found[0] if found else ():
        paper = [_number(v) for v in table.paper_correlations.get(criterion, (None, None))]
        ours = []
        for kind, place in kinds:
            values = [run[criterion][place][kind] for run in found]
            constant = any(value is None for value in values)
            ours.append("constant" if constant else _spread(estimate(values)))
        lines.append(_line([criterion, *paper, *ours]))
    seeds = f"{len(found)} {'seed' if len(found) == 1 else 'seeds'}"
    caption = (
        f"Rank: Spearman's correlation; value: Pearson's; mean ± standard deviation over {seeds}. "
        "The paper's Ortho stands beside the score as it prints it."
    )
    return "\n".join([*lines, "", " ".join([caption, *table.notes]), ""])


def _line(cells: Sequence[str]) -> str:
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _spread(values: Estimate) -> str:
    spread = "" if values.deviation is None else f" ± {values.deviation:.2f}"
    return f"{values.mean:.2f}{spread}"


def _paper_gain(table: Table, row: Row) -> str:
    if row.standard is None or row.paper is None:
        return ""
    standard = table.row(row.standard).paper
    if standard is None:
        return ""
    gain = row.paper - standard
    return f"{-gain if table.metric == ERROR else gain:+.4g}"


def _gain(gain: Estimate | None) -> str:
    if gain is None:
        return ""
    if gain.half_width is None:
        return f"{gain.mean:+.2f} (one seed: no interval)"
    low, high = gain.mean - gain.half_width, gain.mean + gain.half_width
    return f"{gain.mean:+.2f} [{low:+.2f}, {high:+.2f}]"
