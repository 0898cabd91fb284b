"""Tables as data: which runs answer which question; ``paper.yaml`` explains the form."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from repr_det.errors import UserError

ACCURACY, ERROR, AP = "accuracy", "error", "AP"

RECORDS = "seed_*[0-9].json"
"""The records of a row in its folder, without ``seed_1.failed.json``."""

Overrides = dict[str, Any]
"""Values by dotted key of the config."""


@dataclass(frozen=True)
class Row:
    """One line of a table: a run for each seed.

    Attributes:
        name: names the row on the command line and its folder.
        label: what the table prints.
        paper: the number that the paper prints, or None.
        config: a config file.
        overrides: merged into it.
        standard: name of the row of standard training that this row is compared with; None for
            such a row itself.
        teacher: name of the row whose network teaches this one, or None.
        teacher_seed: the seed of that network, counted from this one's.
    """

    name: str
    label: str
    paper: float | None
    config: str
    overrides: Overrides = field(default_factory=dict)
    standard: str | None = None
    teacher: str | None = None
    teacher_seed: int = 0


@dataclass(frozen=True)
class Table:
    """A table of the paper, a figure of it as a table, or a study of our own.

    Attributes:
        name: names the table on the command line and its folder.
        title: its heading.
        rows: in the order in which they are printed and run; teachers before their students.
        metric: what its numbers are: :data:`ACCURACY`, :data:`ERROR`, or :data:`AP` of detectors.
        notes: printed below the table, sentences.
        quick_images: training images of the shortened runs.
        correlates: every trained network's criteria are correlated with the greedy oracle.
        paper_correlations: the paper's, (of ranks, of values) by criterion.
        whole: the table that these rows were taken from; None for a whole table.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    metric: str = ACCURACY
    notes: tuple[str, ...] = ()
    quick_images: int = 3000
    correlates: bool = False
    paper_correlations: dict[str, Sequence[float]] = field(default_factory=dict)
    whole: Table | None = None

    def row(self, name: str) -> Row:
        """The row of a name.

        Raises:
            UserError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise UserError(
            f"Table {self.name} has no row {name!r}. Set one of "
            f"{', '.join(row.name for row in self.rows)}."
        )


def read_tables(path: Path) -> dict[str, Table]:
    """The tables of a YAML file, by name."""
    return {
        name: _table(name, **content)
        for name, content in yaml.safe_load(path.read_text(encoding="utf-8")).items()
    }


def _table(
    name: str,
    rows: dict[str, dict[str, Any]],
    config: str = "",
    overrides: Overrides | None = None,
    notes: Sequence[str] = (),
    **rest: Any,
) -> Table:
    found: list[Row] = []
    for row_name, content in rows.items():
        common = {"config": config, **content}
        common["overrides"] = {**(overrides or {}), **content.get("overrides", {})}
        if "standard" in rows and row_name != "standard" and "pair" not in content:
            common.setdefault("standard", "standard")
        found += _rows(str(row_name), **common)
    return Table(name=name, rows=tuple(found), notes=tuple(notes), **rest)


def _rows(
    name: str, *, overrides: Overrides, pair: str | None = None, paper: Any = None, **rest: Any
) -> Iterator[Row]:
    """The row of an entry, or the two of a pair."""
    if pair is None:
        yield Row(name=name, paper=paper, overrides=overrides, **rest)
        return
    standard, method = paper or (None, None)
    off = {**overrides, "REPR.ENABLED": False}
    yield Row(f"{name}-standard", pair, standard, overrides=off, **rest)
    rest["standard"] = f"{name}-standard"
    yield Row(f"{name}-repr", f"{pair}, RePr", method, overrides=overrides, **rest)


def only(table: Table, patterns: Sequence[str]) -> Table:
    """The table with some rows, and the rows that they are compared with or taught by.

    Args:
        table: a whole table.
        patterns: shell-style patterns of row names; empty for all.

    Raises:
        UserError: a pattern that matches no row.
    """
    if not patterns:
        return table
    names = [row.name for row in table.rows]
    wanted: set[str | None] = set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise UserError(
                f"Table {table.name} has no row {pattern!r}. Set some of {', '.join(names)}."
            )
        wanted.update(found)
    # Backwards, because whatever a row needs stands before it.
    for row in reversed(table.rows):
        if row.name in wanted:
            wanted.update((row.standard, row.teacher))
    rows = tuple(row for row in table.rows if row.name in wanted)
    return replace(table, rows=rows, whole=table)


_FOLDER = Path(__file__).parent
PAPER, STUDIES = (read_tables(_FOLDER / name) for name in ("paper.yaml", "studies.yaml"))
TABLES = PAPER | STUDIES
