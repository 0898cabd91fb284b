from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from repr_det.report.statistics import (
    estimate,
    paired_difference,
    pearson,
    spearman,
    t_quantile,
)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 29, 100, 301])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_t_quantile(degrees, level):
    assert t_quantile(degrees, level) == pytest.approx(
        scipy.stats.t.ppf((1 + level) / 2, degrees), rel=1e-9
    )


@pytest.mark.parametrize(("degrees", "level"), [(0, 0.95), (3, 1.0), (3, 0.0)])
def test_t_quantile_out_of_range(degrees, level):
    with pytest.raises(ValueError, match="no t quantile"):
        t_quantile(degrees, level)


def test_paired_interval_is_that_of_scipys_paired_test():
    rng = np.random.default_rng(0)
    ours, reference = rng.normal(67, 1, 6), rng.normal(66, 1, 6)
    found = paired_difference(dict(enumerate(ours)), dict(enumerate(reference)))
    expected = scipy.stats.ttest_rel(ours, reference).confidence_interval(0.95)
    assert found.mean - found.half_width == pytest.approx(expected.low)
    assert found.mean + found.half_width == pytest.approx(expected.high)
    assert found.deviation == pytest.approx(np.std(ours - reference, ddof=1))
    assert found.count == 6


def test_seeds_without_a_partner_do_not_count():
    found = paired_difference({0: 5.0, 1: 7.0, 4: 100.0}, {0: 4.0, 1: 4.0, 2: -9.0})
    assert (found.mean, found.count) == (2.0, 2)
    assert paired_difference({0: 5.0}, {1: 5.0}) is None


def test_one_value_has_no_spread():
    assert estimate([3.5]) == (3.5, None, 1, None)
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    samples = rng.normal(2.0, 3.0, (4000, 4)).tolist()
    covered = sum(abs(e.mean - 2.0) <= e.half_width for e in map(estimate, samples))
    assert 0.94 < covered / 4000 < 0.96


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=3, max_size=30))
def test_correlations(pairs):
    x, y = (list(values) for values in zip(*pairs, strict=True))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert pearson(x, y) is None and spearman(x, y) is None
        return
    assert pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic, abs=1e-9)
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-9)
