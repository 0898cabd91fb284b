"""Means, paired differences with their intervals, and correlations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from repr_det.errors import UserError


class Estimate(NamedTuple):
    """A mean with its spread.

    Attributes:
        mean: of the values.
        deviation: sample standard deviation (n - 1); None for a single value.
        count: n.
        half_width: half of the t-interval of the mean; None for a single value.
    """

    mean: float
    deviation: float | None
    count: int
    half_width: float | None


def t_quantile(degrees: int, level: float = 0.95) -> float:
    """The t with ``P(|T| <= t) = level`` for Student's distribution.

    Args:
        degrees: of freedom, at least 1.
        level: in (0, 1).

    Raises:
        UserError: an argument out of range.
    """
    if degrees < 1 or not 0 < level < 1:
        raise UserError(
            f"There is no t quantile for {degrees} degrees of freedom and level {level}: give at "
            "least 1 and a level between 0 and 1."
        )
    # In terms of the angle theta = atan(t / sqrt(degrees)) the distribution is a finite sum.
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        if _t_probability(middle, degrees) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _t_probability(theta: float, degrees: int) -> float:
    """``P(|T| <= sqrt(degrees) tan(theta))``; Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = degrees % 2
    term = sine * cosine if odd else sine
    total = 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    return 2 / math.pi * (theta + total) if odd else total


def estimate(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean, standard deviation and t-interval of the mean with n - 1 degrees of freedom.

    Args:
        values: n numbers.
        level: of the interval.

    Raises:
        UserError: no values.
    """
    if not values:
        raise UserError("There is no mean of no values: give at least one.")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(mean, None, 1, None)
    deviation = statistics.stdev(values)
    half_width = t_quantile(len(values) - 1, level) * deviation / math.sqrt(len(values))
    return Estimate(mean, deviation, len(values), half_width)


def paired_difference(
    ours: dict[int, float], reference: dict[int, float], level: float = 0.95
) -> Estimate | None:
    """The difference of two kinds of runs, taken seed by seed.

    Args:
        ours: a value by seed.
        reference: a value by seed, subtracted.
        level: of the interval.

    Returns:
        Over the seeds that both have; None where there are none.
    """
    seeds = sorted(ours.keys() & reference.keys())
    if not seeds:
        return None
    return estimate([ours[seed] - reference[seed] for seed in seeds], level)


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlation of two sequences of n values; None where one is constant or n is below 2."""
    try:
        return statistics.correlation(x, y)
    except statistics.StatisticsError:
        return None


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlation of ranks, equal values sharing their mean rank; None as in :func:`pearson`."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    begin = 0
    while begin < len(order):
        end = begin
        while end < len(order) and values[order[end]] == values[order[begin]]:
            end += 1
        for index in order[begin:end]:
            ranks[index] = (begin + end + 1) / 2
        begin = end
    return ranks
