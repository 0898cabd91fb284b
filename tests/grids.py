"""Combinations of what tests vary, of which the everyday tests take a few."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle, islice, product
from typing import Any

import pytest


def covering(first: Iterable[Any], *others: Iterable[Any]) -> list[Any]:
    """All combinations, for ``pytest.mark.parametrize``; those that add no new value are slow.

    The everyday ones have each value of ``first``, and each combination of the others.
    """
    firsts, rest = list(first), list(product(*others))
    turns = max(len(firsts), len(rest))
    everyday = set(islice(zip(cycle(firsts), cycle(rest)), turns))
    return [
        pytest.param(value, *values, marks=[] if (value, values) in everyday else pytest.mark.slow)
        for value, values in product(firsts, rest)
    ]
