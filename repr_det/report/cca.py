"""Canonical correlations of activations: how much the filters of a layer say the same.

Canonical correlations of two sets of variables (Hotelling 1936) are the cosines of the principal
angles between the spaces that their centred values span, so they come from orthonormal bases and
one singular value decomposition (Björck and Golub 1973).
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repr_det.errors import UserError

POSITIONS, IMAGES = "positions", "images"

Matrix = NDArray[np.float64]


def canonical_correlations(x: ArrayLike, y: ArrayLike) -> Matrix:
    """Correlations of two sets of variables.

    Args:
        x: (n, p), n observations of p variables.
        y: (n, q)

    Returns:
        (min(rank x, rank y),) falling, in [0, 1]; empty where a side is constant.

    Raises:
        UserError: not two matrices of n rows; values that are not finite; or so few observations
            that some correlations are 1 whatever the values.
    """
    return _correlations(_basis(x), _basis(y))


def mean_cca(x: ArrayLike, y: ArrayLike) -> float:
    """Mean of the canonical correlations; NaN where a side is constant.

    Args and errors as in :func:`canonical_correlations`.
    """
    return _mean(canonical_correlations(x, y))


def svcca(x: ArrayLike, y: ArrayLike, variance: float = 0.99) -> float:
    """Singular vector CCA: mean canonical correlation of what matters on each side.

    Each side is first replaced by its fewest principal directions that explain so much of its
    variance, so that directions of noise do not count as much as all others (Raghu et al. 2017,
    section 2).

    Args:
        x: (n, p), n observations of p variables.
        y: (n, q)
        variance: share to be explained, in (0, 1].

    Returns:
        In [0, 1]; NaN where a side is constant.

    Raises:
        UserError: as in :func:`canonical_correlations`, or a variance out of range.
    """
    return _mean(_correlations(_basis(x, variance), _basis(y, variance)))


def spatial_samples(activations: ArrayLike) -> Matrix:
    """Activations of a layer as observations of its filters, for CCA between layers or runs.

    Every position of every image is an observation, and every filter a variable (Raghu et al. 2017,
    section 3, for conv layers of equal size).

    Args:
        activations: (images, filters, height, width).

    Returns:
        (images * height * width, filters).

    Raises:
        UserError: another shape.
    """
    checked = _checked(activations)
    return np.moveaxis(checked, 1, -1).reshape(-1, checked.shape[1])


def filter_cca(
    activations: ArrayLike, observations: str = POSITIONS, variance: float | None = None
) -> Matrix:
    """Mean canonical correlation of each pair of filters of a layer, the paper's heat map.

    Args:
        activations: (images, filters, height, width).
        observations: what counts as an observation. ``"positions"``: each position of each image;
            a filter is one variable, so the correlation is the absolute Pearson correlation; fit
            for few large images, as in detection. ``"images"``: a filter has a variable for each
            position; needs more than twice as many images as positions (pool first), or variance.
        variance: None, or the share for :func:`svcca`'s choice of directions, with ``"images"``.

    Returns:
        (filters, filters), symmetric, 1 on the diagonal; NaN for filters that are constant.

    Raises:
        UserError: another shape, observations of another name, or as in :func:`svcca`.
    """
    if observations not in (POSITIONS, IMAGES):
        raise UserError(
            f"Observations are {POSITIONS!r} or {IMAGES!r}, not {observations!r}: give one of them."
        )
    if observations == POSITIONS and variance is not None:
        raise UserError(
            f"With {POSITIONS!r} a filter is one variable, of which no share can be explained: "
            f"leave variance out, or take {IMAGES!r}."
        )
    checked = _checked(activations)
    images, filters = checked.shape[:2]
    by_filter = np.moveaxis(checked, 1, 0).reshape(filters, images, -1)
    if observations == POSITIONS:
        by_filter = by_filter.reshape(filters, -1, 1)
    bases = [_basis(values, variance) for values in by_filter]
    if observations == POSITIONS:
        # All pairs at once: a layer of detection has thousands of filters.
        _check_observations(1, 1, by_filter.shape[1])
        columns = [b if b.size else np.full((len(b), 1), np.nan) for b in bases]
        stacked = np.concatenate(columns, axis=1)
        return np.clip(np.abs(stacked.T @ stacked), 0, 1)
    table = np.eye(filters)
    for first, second in itertools.combinations(range(filters), 2):
        table[first, second] = _mean(_correlations(bases[first], bases[second]))
        table[second, first] = table[first, second]
    constant = [not basis.shape[1] for basis in bases]
    table[np.diag(constant)] = np.nan
    return table


def _checked(activations: ArrayLike) -> Matrix:
    array = np.asarray(activations, dtype=float)
    if array.ndim != 4:
        raise UserError(
            f"Activations of a conv layer have the shape (images, filters, height, width), not "
            f"{array.shape}: give them as they leave the layer."
        )
    return array


def _basis(values: ArrayLike, variance: float | None = None) -> Matrix:
    """(n, r), an orthonormal basis of the centred variables, main directions first."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 2 or not np.isfinite(array).all():
        raise UserError(
            f"CCA takes finite values of shape (observations, variables), not {array.shape} or "
            "infinite ones: give such a matrix."
        )
    if variance is not None and not 0 < variance <= 1:
        raise UserError(f"The variance to explain is {variance}: give a share in (0, 1].")
    # Subtracting a mean of large values leaves rounding errors, which are no direction of their
    # own: the limit is that of a rank (Golub and Van Loan, section 5.5.8), by the raw values.
    limit = max(array.shape) * np.finfo(float).eps * np.linalg.norm(array)
    left, singular, _ = np.linalg.svd(array - array.mean(axis=0), full_matrices=False)
    rank = int((singular > limit).sum())
    if variance is not None and rank:
        explained = np.cumsum(singular[:rank] ** 2)
        share = explained / explained[-1]
        rank = min(rank, int(np.searchsorted(share, variance - 1e-12)) + 1)
    return left[:, :rank]


def _correlations(first: Matrix, second: Matrix) -> Matrix:
    number = len(first)
    if number != len(second):
        raise UserError(
            f"CCA needs the same observations of both sides, not {number} and {len(second)}: give "
            "matrices with equally many rows."
        )
    _check_observations(first.shape[1], second.shape[1], number)
    return np.clip(np.linalg.svd(first.T @ second, compute_uv=False), 0, 1)


def _check_observations(first: int, second: int, number: int) -> None:
    # Centred variables live in n - 1 dimensions, where spaces that are too large must meet.
    if first and second and first + second > number - 1:
        raise UserError(
            f"CCA of {first} and {second} independent variables needs more than {first + second} "
            f"observations, not {number}: give more, or fewer variables."
        )


def _mean(correlations: Matrix) -> float:
    return float(correlations.mean()) if correlations.size else float("nan")
