"""Records of runs as a table in Markdown, the paper's numbers beside ours."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.correlation import EVERYWHERE
from experiments.measures import MEASURES, Record
from experiments.tables import ERROR, Row, Table
from repr_det.report.statistics import Estimate, estimate, paired_difference


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
            "length. These numbers only show that everything runs; they are no result.**\n"
        )
    body = _correlations(table, records) if table.correlates else _values(table, records)
    return f"{heading}\n{body}"


def _values(table: Table, records: Sequence[Record]) -> str:
    measure = MEASURES[table.metric]
    columns = measure.columns
    by_row: dict[str, list[Record]] = {row.name: [] for row in table.rows}
    for record in records:
        by_row[record["row"]].append(record)
    values = {
        (name, column): {r["seed"]: measure.value(r, column.name) for r in found if _ended(r)}
        for name, found in by_row.items()
        for column in columns
    }
    papers = any(row.paper is not None for row in table.rows)
    gains = [f"{column.gain}, 95 % interval" for column in columns]
    head = ["", *(column.label for column in columns), "Seeds"]
    if papers:
        head[1:1] = ["Paper"]
        head.append("Paper's gain")
    head += gains
    lines = [_line(head), "|---" * len(head) + "|"]
    for row in table.rows:
        ours, own_gains = [], []
        for column in columns:
            found = values[row.name, column]
            shown = [100 - v if table.metric == ERROR else v for v in found.values()]
            ours.append(_spread(estimate(shown)) if shown else "not run")
            standard = values[row.standard, column] if row.standard else {}
            own_gains.append(_gain(paired_difference(found, standard)))
        ended = len(values[row.name, columns[0]])
        diverged = len(by_row[row.name]) - ended
        seeds = f"{ended} ({diverged} more diverged)" if diverged else str(ended)
        cells = [row.label, *ours, seeds]
        if papers:
            cells[1:1] = [_number(row.paper)]
            cells.append(_paper_gain(table, row))
        lines.append(_line([*cells, *own_gains]))
    caption = (
        f"{measure.caption}; then mean ± standard deviation over seeds. Gain: {measure.compared} "
        "minus that of standard training with the same seed (same initial weights, same data "
        "order), in points, so above zero is better; in brackets the t-interval of its mean with "
        "n - 1 degrees of freedom."
    )
    return "\n".join([*lines, "", " ".join([caption, *table.notes]), ""])


def _ended(record: Record) -> bool:
    return "diverged" not in record


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
