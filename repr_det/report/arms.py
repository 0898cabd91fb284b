"""Runs in arms, one of which is the baseline of all others."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from repr_det.cli.arguments import baseline_of, named_arms
from repr_det.errors import UserError
from repr_det.report.metrics import MAIN
from repr_det.report.run import RunFolder, read_run
from repr_det.tasks import use_data

STANDARD, REPR, BEFORE = "standard", "RePr", "before training"
"""What runs without and with RePr are called where nobody named them, and what all began with."""


@dataclass(frozen=True)
class Arms:
    """Comparable runs by arm.

    Attributes:
        groups: the runs of each arm by its name, the baseline first; seeds of one setting.
        baseline: the name of the arm that all others are compared with.
    """

    groups: dict[str, list[RunFolder]]
    baseline: str

    @property
    def runs(self) -> list[RunFolder]:
        """All runs, arm by arm."""
        return [run for group in self.groups.values() for run in group]

    @property
    def others(self) -> list[str]:
        """The arms that are compared with the baseline."""
        return [name for name in self.groups if name != self.baseline]

    @property
    def with_repr(self) -> list[RunFolder]:
        """All runs that were trained with RePr."""
        return [run for run in self.runs if run.uses_repr]


def by_method(runs: Sequence[RunFolder]) -> Arms:
    """Runs without RePr as the baseline, and runs with it; an arm without runs is left out.

    Raises:
        UserError: see :func:`check_comparable`.
    """
    groups = {
        STANDARD: [run for run in runs if not run.uses_repr],
        REPR: [run for run in runs if run.uses_repr],
    }
    check_comparable(runs)
    return arms_of({name: found for name, found in groups.items() if found})


def arms_of(groups: Mapping[str, Sequence[RunFolder]], baseline: str | None = None) -> Arms:
    """Named arms, the baseline first.

    Args:
        groups: runs by arm.
        baseline: an arm; None for the first.

    Raises:
        UserError: see :func:`check_comparable`; or no such arm.
    """
    check_comparable([run for group in groups.values() for run in group])
    first = baseline_of(groups, baseline)
    names = [first, *(name for name in groups if name != first)]
    return Arms({name: list(groups[name]) for name in names}, first)


def check_comparable(runs: Sequence[RunFolder]) -> None:
    """Refuse runs whose metrics do not mean the same.

    Raises:
        UserError: no runs, one named twice, or of different tasks or test sets; a held-out part
            of another size holds other images.
    """
    if not runs:
        raise UserError("There are no runs to report on. Set at least one folder.")
    folders = [run.folder.resolve() for run in runs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"{folder} is named twice. Name each run once.")
    for run in runs[1:]:
        for what, mine, first in (
            ("task", run.task, runs[0].task),
            ("test set", run.test_set, runs[0].test_set),
            ("number of held-out images", run.held_out, runs[0].held_out),
        ):
            if mine != first:
                raise UserError(
                    f"The {what} of {run.folder} is {mine}, that of {runs[0].folder} {first}: "
                    "their metrics cannot be compared, so report on them one by one."
                )


def last_common_evaluation(runs: Sequence[RunFolder]) -> int | None:
    """The last iteration at which all runs were evaluated; None where there is none."""
    found = [run.evaluations(MAIN[run.task]) for run in runs]
    if any(series is None for series in found):
        return None
    common = set.intersection(*(set(series.index) for series in found))
    return max(map(int, common), default=None)


def value_at(run: RunFolder, metric: str, iteration: int) -> float | None:
    """A metric as it was evaluated at an iteration; None where it was not."""
    series = run.evaluations(metric)
    return None if series is None or iteration not in series.index else float(series[iteration])


def read_arms(args: argparse.Namespace) -> Arms:
    """The runs of a command line, by ``--arm``, or by method where only runs are named.

    Args:
        args: with ``runs``, and what :func:`repr_det.cli.arguments.add_arms` and
            :func:`repr_det.cli.arguments.add_data` add.

    Raises:
        UserError: runs that are not there or cannot be compared, or both ways at once.
    """
    named = named_arms(args)
    if named and args.runs:
        raise UserError(f"{args.runs[0]} belongs to no arm. Set --arm NAME {args.runs[0]}.")
    groups = named or {"": args.runs}
    read = {name: [read_run(folder) for folder in folders] for name, folders in groups.items()}
    for run in (run for group in read.values() for run in group):
        use_data(run.cfg, args)
    return arms_of(read, args.baseline) if named else by_method(read[""])
