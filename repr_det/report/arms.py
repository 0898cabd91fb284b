"""Runs in arms, one of which is the baseline of all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from repr_det.errors import UserError
from repr_det.report.metrics import MAIN
from repr_det.report.run import RunFolder

STANDARD, REPR, BEFORE = "standard", "RePr", "before training"
"""Default names of the arms without and with RePr, and the name of the network before training."""


@dataclass(frozen=True)
class Arms:
    """Comparable runs by arm.

    Attributes:
        groups: the runs of each arm by its name, the baseline first; seeds of one setting.
    """

    groups: dict[str, list[RunFolder]]

    @property
    def baseline(self) -> str:
        """The arm that all others are compared with."""
        return next(iter(self.groups))

    @property
    def runs(self) -> list[RunFolder]:
        """All runs, arm by arm."""
        return [run for group in self.groups.values() for run in group]

    @property
    def others(self) -> list[str]:
        """The arms that are compared with the baseline."""
        return list(self.groups)[1:]

    @property
    def with_repr(self) -> list[RunFolder]:
        """All runs that were trained with RePr."""
        return [run for run in self.runs if run.uses_repr]


def longest(runs: Sequence[RunFolder]) -> RunFolder:
    """The first run of those with the most iterations."""
    return max(runs, key=lambda run: run.iterations)


def by_method(runs: Sequence[RunFolder]) -> Arms:
    """Runs without RePr as the baseline, and runs with it; an arm without runs is left out.

    Raises:
        UserError: see :func:`check_comparable`.
    """
    groups = {
        STANDARD: [run for run in runs if not run.uses_repr],
        REPR: [run for run in runs if run.uses_repr],
    }
    return arms_of({name: found for name, found in groups.items() if found})


def arms_of(groups: Mapping[str, Sequence[RunFolder]], baseline: str | None = None) -> Arms:
    """Named arms, the baseline first.

    Args:
        groups: runs by arm.
        baseline: one of the arms; None for the first.

    Raises:
        UserError: see :func:`check_comparable`.
    """
    check_comparable([run for group in groups.values() for run in group])
    first = next(iter(groups)) if baseline is None else baseline
    names = dict.fromkeys([first, *groups])
    return Arms({name: list(groups[name]) for name in names})


def check_comparable(runs: Sequence[RunFolder]) -> None:
    """Refuse runs whose metrics do not mean the same.

    Raises:
        UserError: there are no runs, a run is named twice, or tasks or test sets differ. Held-out
            parts of different sizes are different test sets.
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
