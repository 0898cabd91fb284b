"""The runs of a table over time, from its records alone: each row beside its standard training."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure

from experiments.measures import MEASURES, Record
from experiments.tables import AP, Table
from repr_det.errors import UserError
from repr_det.method.schedule import RePrSchedule
from repr_det.report import plots
from repr_det.report.plots import REPR, STANDARD, Line, Panel
from repr_det.report.run import rate_steps
from repr_det.report.statistics import estimate

Curve = dict[int, float]
"""A number by the iterations done."""


def over_time(table: Table, records: Sequence[Record]) -> Figure:
    """What the table compares, at every evaluation: means over the seeds that a pair has in common.

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
    panels, counts = [], []
    for row in table.rows:
        if row.standard is None:
            continue
        pair = by_row[row.standard], by_row[row.name]
        if not (seeds := sorted(pair[0].keys() & pair[1].keys())):
            continue
        counts.append(len(seeds))
        record = pair[1][seeds[0]]
        # The settings of a record are in iterations.
        unit = 1.0 if table.metric == AP else _iterations_an_epoch(record)
        labels = table.row(row.standard).label, row.label
        lines = [
            _line([found[seed] for seed in seeds], measure.columns[0].name, unit, side, label)
            for found, side, label in zip(pair, (STANDARD, REPR), labels, strict=True)
        ]
        panels.append(
            Panel(
                measure.axis,
                lines,
                spans=[(begin / unit, end / unit) for begin, end in _sub_spans(record)],
                rate_drops=[step / unit for step in _rate_steps(record)],
            )
        )
    if not panels:
        raise UserError(
            f"Table {table.name} has no row that is recorded together with its standard training: "
            "train some first, or give another --output."
        )
    counts = sorted({min(counts), max(counts)})
    seeds = "one seed" if counts == [1] else f"means over {' to '.join(map(str, counts))} seeds"
    xlabel = f"{'iteration' if table.metric == AP else 'epoch'}; {seeds}"
    return plots.curves(panels, xlabel=xlabel, spread="± standard deviation")


def _iterations_an_epoch(record: Record) -> float:
    return record["training_images"] / record["settings"]["SOLVER"]["IMS_PER_BATCH"]


def _curve(record: Record, name: str) -> Curve:
    evaluations = list(record["evaluations"].values())[-1]
    return {entry["iteration"]: entry[name] for entry in evaluations}


def _line(records: Sequence[Record], name: str, unit: float, side: str, label: str) -> Line:
    """Mean and spread of runs of one row, at the iterations that all of them were evaluated at."""
    runs = [_curve(record, name) for record in records]
    times = sorted(set.intersection(*(set(run) for run in runs)))
    values = [[run[time] for run in runs] for time in times]
    return Line(
        [time / unit for time in times],
        [fmean(at_once) for at_once in values],
        side,
        label,
        marker="o" if len(times) <= 12 else "",
        spread=[estimate(at_once).deviation for at_once in values] if len(runs) > 1 else None,
    )


def _sub_spans(record: Record) -> list[tuple[int, int]]:
    keys = record["settings"]["REPR"]
    if not keys["ENABLED"]:
        return []
    return RePrSchedule(keys["S1"], keys["S2"], keys["N"]).sub_spans()


def _rate_steps(record: Record) -> list[float]:
    solver = record["settings"]["SOLVER"]
    return rate_steps(solver, solver["MAX_ITER"]) or []
