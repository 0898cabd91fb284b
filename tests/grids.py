"""Combinations of what tests vary, of which the everyday tests take a few."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def covering(first: Iterable[Any], *others: Iterable[Any]) -> list[Any]:
    """All combinations, for ``pytest.mark.parametrize``; those that add no new value are slow.

    The everyday ones have each value of ``first``, and each combination of the others.
    """
    firsts, rest = list(first), list(product(*others))
    everyday = {
        (firsts[i % len(firsts)], *rest[i % len(rest)]) for i in range(max(len(firsts), len(rest)))
    }
    return [
        pytest.param(*values, marks=[] if values in everyday else pytest.mark.slow)
        for values in ((value, *combination) for value in firsts for combination in rest)
    ]
