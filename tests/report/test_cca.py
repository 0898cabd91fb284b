"""Canonical correlations of data that was made to have known ones."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from repr_det.report.cca import (
    canonical_correlations,
    filter_cca,
    mean_cca,
    spatial_samples,
    svcca,
)


def orthonormal(generator, n, columns):
    """Columns that are centred, orthogonal and of length 1, exactly."""
    values = generator.normal(size=(n, columns))
    return np.linalg.qr(values - values.mean(axis=0))[0]


def pair(generator, n, correlations, extra=0):
    """Two mixed sets of variables whose canonical correlations are exactly these, and zeros."""
    size = len(correlations)
    base = orthonormal(generator, n, 2 * size + extra)
    rho = np.array(correlations)
    x, rest = base[:, :size], base[:, size : 2 * size]
    y = np.concatenate([x * rho + rest * np.sqrt(1 - rho**2), base[:, 2 * size :]], axis=1)
    mixed = [v @ generator.normal(size=(v.shape[1],) * 2) + generator.normal() for v in (x, y)]
    return tuple(mixed)


@pytest.mark.parametrize("rho", [[0.9, 0.5, 0.1], [1.0, 0.3], [0.0], [1.0]])
@pytest.mark.parametrize("extra", [0, 4])
def test_correlations_are_those_of_construction(rho, extra):
    x, y = pair(np.random.default_rng(0), 60, rho, extra)
    np.testing.assert_allclose(canonical_correlations(x, y), rho, atol=1e-9)
    np.testing.assert_allclose(canonical_correlations(y, x), rho, atol=1e-9)
    assert mean_cca(x, y) == pytest.approx(np.mean(rho), abs=1e-9)


def test_correlations_are_those_of_the_eigenvalue_problem():
    generator = np.random.default_rng(1)
    x = generator.normal(size=(500, 4))
    y = x[:, :3] @ generator.normal(size=(3, 3)) + generator.normal(size=(500, 3))
    cov = np.cov(x.T, y.T)
    a, b, c = cov[:4, :4], cov[:4, 4:], cov[4:, 4:]
    squares = scipy.linalg.eigh(b.T @ np.linalg.solve(a, b), c, eigvals_only=True)
    np.testing.assert_allclose(canonical_correlations(x, y), np.sqrt(squares[::-1]), atol=1e-9)


def test_variables_that_repeat_others_do_not_count():
    x, y = pair(np.random.default_rng(2), 60, [0.8, 0.2])
    doubled = np.concatenate([x, x @ [[1.0], [2.0]], np.full((60, 1), 1e4)], axis=1)
    np.testing.assert_allclose(canonical_correlations(doubled, y), [0.8, 0.2], atol=1e-8)


def test_independent_noise_has_the_correlation_of_chance():
    generator = np.random.default_rng(3)
    squares = [mean_cca(*generator.normal(size=(2, 50, 1))) ** 2 for _ in range(400)]
    # The square of a sample correlation is Beta(1/2, (n - 2) / 2), with mean 1 / (n - 1).
    spread = np.sqrt(2 * 48 / (49**2 * 51) / 400)
    assert np.mean(squares) == pytest.approx(1 / 49, abs=4 * spread)


def signal_and_noise(generator, n=400):
    """Two sides with a strong shared direction each, and three weak ones of their own."""
    base = orthonormal(generator, n, 8)
    rho = 0.8
    shared = base[:, :1], rho * base[:, :1] + np.sqrt(1 - rho**2) * base[:, 1:2]
    sides = zip(shared, (base[:, 2:5], base[:, 5:8]), strict=True)
    turn = np.linalg.qr(generator.normal(size=(4, 4)))[0]
    return [np.concatenate([one, 0.05 * noise], axis=1) @ turn for one, noise in sides]


def test_svcca_looks_at_what_matters():
    x, y = signal_and_noise(np.random.default_rng(4))
    # The strong direction has 1 / 1.0075 = 99.26 % of the variance.
    assert svcca(x, y) == pytest.approx(0.8, abs=1e-9)
    assert mean_cca(x, y) == pytest.approx(0.2, abs=1e-9)
    # One of the three equal noise directions brings it above 99.4 %.
    assert svcca(x, y, 0.994) == pytest.approx(0.4, abs=1e-9)
    assert svcca(x, y, 1.0) == pytest.approx(0.2, abs=1e-9)


def test_svcca_does_not_see_rotation_scale_and_shift():
    generator = np.random.default_rng(5)
    x, y = signal_and_noise(generator)
    turned = 3 * x @ np.linalg.qr(generator.normal(size=(4, 4)))[0] - 7
    assert svcca(turned, y) == pytest.approx(svcca(x, y), abs=1e-9)
    assert svcca(x, turned) == pytest.approx(1, abs=1e-9)


def test_spatial_samples_keep_filters_apart():
    activations = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    samples = spatial_samples(activations)
    assert samples.shape == (40, 3)
    assert samples[20 + 2 * 5 + 3].tolist() == activations[1, :, 2, 3].tolist()


def test_pairs_of_filters_over_positions():
    generator = np.random.default_rng(6)
    activations = generator.normal(size=(3, 5, 7, 6)).astype(np.float32)
    activations[:, 2] = -2 * activations[:, 0] + 3
    activations[:, 3] += activations[:, 1]
    activations[:, 4] = 0.7
    table = filter_cca(activations)
    expected = np.abs(np.corrcoef(activations[:, :4].swapaxes(0, 1).reshape(4, -1)))
    np.testing.assert_allclose(table[:4, :4], expected, atol=1e-6)
    assert table[0, 2] == pytest.approx(1, abs=1e-6)
    assert np.isnan(table[4]).all() and np.isnan(table[:, 4]).all()


def test_pairs_of_filters_over_images():
    generator = np.random.default_rng(7)
    x, y = pair(generator, 40, [0.9, 0.6, 0.3, 0.0])
    z = orthonormal(generator, 40, 4)
    activations = np.stack([x, y, z], axis=1).reshape(40, 3, 2, 2)
    table = filter_cca(activations, "images")
    assert table[0, 1] == table[1, 0] == pytest.approx(0.45, abs=1e-9)
    assert table[1, 2] == pytest.approx(mean_cca(y, z), abs=1e-12)
    assert table.diagonal().tolist() == [1, 1, 1]
    a, b = signal_and_noise(generator)
    activations = np.stack([a, b], axis=1).reshape(400, 2, 2, 2)
    assert filter_cca(activations, "images", 0.99)[0, 1] == pytest.approx(0.8, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: mean_cca(np.ones(3), np.ones((3, 1))), r"\(observations, variables\)"),
        (lambda: mean_cca(np.full((3, 1), np.nan), np.ones((3, 1))), "finite"),
        (lambda: mean_cca(np.eye(9)[:, :2], np.eye(8)[:, :2]), "not 9 and 8"),
        (lambda: mean_cca(np.eye(5)[:, :3], np.eye(5)[:, 2:]), "more than 6 observations, not 5"),
        (lambda: filter_cca(np.ones((1, 3, 1, 2))), "more than 2 observations, not 2"),
        (lambda: svcca(np.eye(5), np.eye(5), 0), r"a share in \(0, 1\]"),
        (lambda: spatial_samples(np.ones((2, 3))), "height, width"),
        (lambda: filter_cca(np.ones((2, 3, 1, 1)), "pixels"), "not 'pixels'"),
        (lambda: filter_cca(np.ones((2, 3, 1, 1)), variance=0.9), "leave variance out"),
    ],
)
def test_mistakes(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
