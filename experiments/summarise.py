"""Recorded runs as tables, curves, and the page of results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from experiments.tables import ACCURACY, AP, ERROR, Row, Table
from repr_det.classification.metrics import CLASSIFICATION_METRICS
from repr_det.detection.metrics import DETECTION_METRICS
from repr_det.errors import UserError
from repr_det.method.schedule import RePrSchedule
from repr_det.report import plots
from repr_det.report.compare import estimate, paired_difference
from repr_det.report.run import rate_steps

Record = dict[str, Any]


class Column(NamedTuple):
    """A number that tables compare: its name in a record's evaluations, and two headings."""

    name: str
    label: str
    gain: str


@dataclass(frozen=True)
class Measure:
    """How the runs of a task are judged.

    Attributes:
        metrics: what a record keeps of an evaluation, as its name in ``metrics.json`` by its name
            in the record.
        columns: what tables compare; a run's value is the first.
        last: a run's value is the mean of this many last evaluations, or of the last one alone
            where there are fewer.
        axis: of figures.
        caption: what a table's numbers are; the beginning of a sentence.
        compared: the number whose difference is a gain.
    """

    metrics: dict[str, str]
    columns: tuple[Column, ...]
    last: int
    axis: str
    caption: str
    compared: str

    def value(self, record: Record, name: str | None = None) -> float | None:
        """A run's number on its last test set; None for a run that diverged.

        Args:
            record: the run's.
            name: of a column, by default the first.
        """
        if "diverged" in record:
            return None
        evaluations = list(record["evaluations"].values())[-1]
        last = evaluations[-self.last :] if len(evaluations) >= self.last else evaluations[-1:]
        return statistics.fmean(entry[name or self.columns[0].name] for entry in last)


_CLASSIFICATION = Measure(
    metrics={m.name.partition("/")[2]: m.name for m in CLASSIFICATION_METRICS},
    columns=(Column("top1", "Ours", "Our gain"),),
    last=5,
    axis="top-1 accuracy, %",
    caption="Ours: the mean of a run's last 5 evaluations (the last one where there are fewer)",
    compared="accuracy",
)
_DETECTION = Measure(
    metrics={
        m.name.replace("bbox/", "").replace("segm/", "mask_"): m.name
        for m in DETECTION_METRICS
        if m.name.endswith(("AP", "AP50", "AP75"))
    },
    columns=(Column("AP", "AP", "Gain in AP"), Column("AP50", "AP50", "Gain in AP50")),
    last=1,
    axis="AP of boxes, %",
    caption="COCO's AP and AP50 of boxes in % at a run's last evaluation",
    compared="AP",
)
MEASURES = {ACCURACY: _CLASSIFICATION, ERROR: _CLASSIFICATION, AP: _DETECTION}
"""By :attr:`experiments.tables.Table.metric`."""


def table_in_markdown(
    table: Table, shortened: bool, records: Sequence[Record], said: Collection[str] = ()
) -> str:
    """A table with its heading and caption.

    Args:
        table: its rows.
        shortened: the records are of shortened runs.
        records: of any rows and seeds of this table.
        said: captions that stand elsewhere on the page and are left out.
    """
    heading = f"# {table.title}\n"
    if shortened:
        heading = (
            f"# {table.title} (SHORTENED RUNS)\n\n"
            f"**Shortened: at most {table.quick_images:,} training images and a tenth of the "
            "length. These numbers only show that everything runs; they are no result.**\n"
        )
    make = _correlations if table.correlates else _values
    frame, caption = make(table, records)
    notes = " ".join(note for note in (caption, *table.notes) if note not in said)
    text = f"{heading}\n{frame.to_markdown(index=False, disable_numparse=True)}\n"
    return f"{text}\n{notes}\n" if notes else text


def _values(table: Table, records: Sequence[Record]) -> tuple[pd.DataFrame, str]:
    measure = MEASURES[table.metric]
    papers = any(row.paper is not None for row in table.rows)
    lines = []
    for row in table.rows:
        own = [record for record in records if record["row"] == row.name]
        ended = [record for record in own if "diverged" not in record]
        others = [r for r in records if r["row"] == row.standard and "diverged" not in r]
        diverged = len(own) - len(ended)
        seeds = f"{len(ended)} ({diverged} more diverged)" if diverged else str(len(ended))
        line = {"": row.label} | ({"Paper": _number(row.paper)} if papers else {})
        gains = {"Paper's gain": _paper_gain(table, row)} if papers else {}
        for name, label, gain in measure.columns:
            values, standard = (
                {record["seed"]: measure.value(record, name) for record in found}
                for found in (ended, others)
            )
            shown = [100 - v if table.metric == ERROR else v for v in values.values()]
            line[label] = mean_and_spread(shown) if shown else "diverged" if diverged else "not run"
            gains[f"{gain}, 95 % interval"] = mean_difference(values, standard)
        lines.append({**line, "Seeds": seeds, **gains})
    return pd.DataFrame(lines), _caption(measure)


def _caption(measure: Measure) -> str:
    return (
        f"{measure.caption}; then mean ± standard deviation over seeds. Gain: {measure.compared} "
        "minus that of standard training with the same seed (same initial weights, same data "
        "order), in points, so above zero is better; in brackets the t-interval of its mean with "
        "n - 1 degrees of freedom."
    )


def _correlations(table: Table, records: Sequence[Record]) -> tuple[pd.DataFrame, str]:
    found = [record["correlations"] for record in records if "correlations" in record]
    lines = []
    for criterion in found[0] if found else ():
        paper = table.paper_correlations.get(criterion, (None, None))
        line = {
            "": criterion,
            "Paper's rank": _number(paper[0]),
            "Paper's value": _number(paper[1]),
        }
        for kind in ("rank", "value"):
            for place in found[0][criterion]:
                values = [run[criterion][place][kind] for run in found]
                text = "constant" if None in values else mean_and_spread(values)
                line[f"{kind.capitalize()}, {place}"] = text
        lines.append(line)
    seeds = f"{len(found)} {'seed' if len(found) == 1 else 'seeds'}"
    caption = (
        f"Rank: Spearman's correlation; value: Pearson's; mean ± standard deviation over {seeds}. "
        "Compare the paper's Ortho with the score as it prints it."
    )
    return pd.DataFrame(lines), caption


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def mean_and_spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation where there are several."""
    found = estimate(values)
    spread = "" if found.deviation is None else f" ± {found.deviation:.2f}"
    return f"{found.mean:.2f}{spread}"


def _paper_gain(table: Table, row: Row) -> str:
    standard = table.row(row.standard).paper if row.standard else None
    if row.paper is None or standard is None:
        return ""
    gain = row.paper - standard
    return f"{-gain if table.metric == ERROR else gain:+.4g}"


def mean_difference(ours: dict[int, float], standard: dict[int, float], level: float = 0.95) -> str:
    """The difference paired over seeds, and its t-interval; empty where no seed has both.

    Args:
        ours: by seed.
        standard: by seed, subtracted.
        level: of the interval.
    """
    gain = paired_difference(ours, standard, level)
    if gain is None:
        return ""
    if gain.half_width is None:
        return f"{gain.mean:+.2f} (one seed: no interval)"
    low, high = gain.mean - gain.half_width, gain.mean + gain.half_width
    return f"{gain.mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def over_time(table: Table, records: Sequence[Record]) -> Figure:
    """Draw what a table compares at every evaluation: means over the seeds that a pair shares.

    A panel for each row that is compared with standard training; the spread is the sample standard
    deviation. Time is in epochs for classifiers, in iterations for detectors.

    Args:
        table: its rows.
        records: of any rows and seeds of this table; runs that diverged do not count.

    Raises:
        UserError: no row is recorded together with its standard training.
    """
    measure = MEASURES[table.metric]
    by_row: dict[str, dict[int, Record]] = {row.name: {} for row in table.rows}
    for record in records:
        if "diverged" not in record:
            by_row[record["row"]][record["seed"]] = record
    panels, counts = [], set()
    for row in table.rows:
        if row.standard is None:
            continue
        pair = by_row[row.standard], by_row[row.name]
        if not (seeds := sorted(pair[0].keys() & pair[1].keys())):
            continue
        counts.add(len(seeds))
        record = pair[1][seeds[0]]
        solver, keys = record["settings"]["SOLVER"], record["settings"]["REPR"]
        # The settings of a record are in iterations.
        unit = 1.0 if table.metric == AP else record["training_images"] / solver["IMS_PER_BATCH"]
        lines = [
            _line([found[seed] for seed in seeds], measure.columns[0].name, unit, colour, label)
            for found, colour, label in zip(
                pair, plots.ARM_COLOURS, (table.row(row.standard).label, row.label), strict=False
            )
        ]
        spans = RePrSchedule(keys["S1"], keys["S2"], keys["N"]).sub_spans()
        panels.append(
            plots.Panel(
                measure.axis,
                lines,
                spans=[(a / unit, b / unit) for a, b in (spans if keys["ENABLED"] else ())],
                rate_drops=[s / unit for s in rate_steps(solver, solver["MAX_ITER"]) or ()],
            )
        )
    if not panels:
        raise UserError(
            f"Table {table.name} has no row that is recorded together with its standard training. "
            "Train some first, or set another --output."
        )
    several = " to ".join(map(str, sorted({min(counts), max(counts)})))
    seeds = "one seed" if counts == {1} else f"means over {several} seeds"
    xlabel = f"{'iteration' if table.metric == AP else 'epoch'}; {seeds}"
    return plots.curves(panels, xlabel=xlabel, spread="± standard deviation")


def _line(records: Sequence[Record], name: str, unit: float, colour: str, label: str) -> plots.Line:
    """Mean and spread of runs of one row, at the iterations that all of them were evaluated at."""
    runs = pd.concat(
        [
            pd.DataFrame(list(record["evaluations"].values())[-1]).set_index("iteration")[name]
            for record in records
        ],
        axis=1,
    ).dropna()
    return plots.Line(
        runs.index / unit,
        runs.mean(axis=1),
        colour,
        label,
        marker="o" if len(runs) <= 12 else "",
        spread=runs.std(axis=1) if len(records) > 1 else None,
    )


_PAGE = """# Results

What was measured with `experiments/`. `python -m experiments --page docs/results.md` writes this
page from the records in `experiments/results/`. `python -m experiments TABLE --show --output
experiments/results` prints one table, and without `--show` and `--output` trains it. Settings of
the rows are in `experiments/paper.yaml` and `experiments/studies.yaml`. The studies `finetune` and
`noise` are planned in `experiments/PROTOCOL.md`; `python -m experiments.run_studies --show` prints
what is left of them.
"""


def results_page(tables: Sequence[Table], records_of: Callable[[Table], Sequence[Record]]) -> str:
    """All tables of which something is recorded, in Markdown.

    Args:
        tables: in the order of the page.
        records_of: reads the full-length records of a table.
    """
    captions = [_caption(measure) for measure in (_CLASSIFICATION, _DETECTION)]
    parts = [_PAGE, *(f"{caption}\n" for caption in captions)]
    for table in tables:
        if records := records_of(table):
            text = table_in_markdown(table, False, records, captions).replace("# ", "## ", 1)
            hours = sum(record["wall_seconds"] for record in records) / 3600
            devices = sorted({record["device"] for record in records})
            own = "cell" not in records[0]
            command = f"experiments {table.name}" if own else "experiments.run_studies"
            parts.append(
                f"{text}\n`python -m {command}`; {len(records)} runs, {hours:.1f} hours on "
                f"{'; '.join(devices)}.\n"
            )
    return "\n".join(parts)
