"""Back: orthogonal re-initialisation (paper, section 3 and Algorithm 1, line 6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repr_det.method.filters import row_lengths
from repr_det.method.products import lower_products

NORM_CHOICES = ("survivors", "previous")
GAMMA_CHOICES = ("survivors", "one", "previous")
BETA_CHOICES = ("zero", "survivors", "previous")


@dataclass(frozen=True)
class Reinit:
    """What a returned filter starts with besides its direction. The paper names none of these.

    Attributes:
        norm: length of a new filter: ``"survivors"`` (their mean length in the layer) or
            ``"previous"`` (the length that the filter had before the drop).
        scale: factor on that length, above 0.
        gamma: scale of the norm: ``"survivors"`` (their mean), ``"one"`` (what a norm is
            initialised with) or ``"previous"``. A frozen norm always keeps ``"previous"``.
        beta: shift of the norm and bias of the conv: ``"zero"``, ``"survivors"`` or ``"previous"``;
            a frozen norm's shift always ``"previous"``.
        outgoing: factor on the weights with which surviving filters of the next layers read a
            returned filter: 1 keeps what they were at the drop, 0 lets the returned filter start
            without influence. Those of a frozen layer, and of filters that read nothing else
            (depthwise), always come back as they were.

    Raises:
        ValueError: a value outside of these.
    """

    norm: str = "survivors"
    scale: float = 1.0
    gamma: str = "survivors"
    beta: str = "zero"
    outgoing: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in (
            ("norm", NORM_CHOICES), ("gamma", GAMMA_CHOICES), ("beta", BETA_CHOICES)
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"RePr re-initialisation: {name} is {getattr(self, name)!r}; "
                    f"give one of {', '.join(choices)}."
                )
        if not self.scale > 0:
            raise ValueError(
                f"RePr re-initialisation: scale is {self.scale}; give a value above 0."
            )
        if not 0 <= self.outgoing <= 1:
            raise ValueError(
                f"RePr re-initialisation: outgoing is {self.outgoing}; give a value from 0 to 1."
            )


_EXACT_ENOUGH = 40
"""What may be left of a row's cosines, in units of rounding: 5e-6 in float32; 1e-5 is promised."""

_SUMMED = 128
"""Rows that are checked at once."""


def orthogonal_directions(
    previous: Tensor, survivors: Tensor, generator: torch.Generator
) -> Tensor:
    """New unit filters, orthogonal to the dropped filters' old values and to the survivors.

    While the null space of both has room for all of them, the new filters are a random orthonormal
    set in it. Where it has not, they take the null space first, then the directions that the
    survivors cover least, and stay orthonormal among themselves up to ``d`` of them.

    Args:
        previous: values of the dropped filters before the drop, shape (p, d).
        survivors: current values of the surviving filters, shape (s, d).
        generator: CPU source of the random directions.

    Returns:
        shape (p, d), unit rows, on the device of ``previous``, float32 or float64.
    """
    count, dimension = previous.shape
    dtype = torch.float64 if previous.dtype == torch.float64 else torch.float32
    # float32 in any case: a random direction needs no more digits.
    random = torch.randn(count, dimension, generator=generator).to(previous.device, dtype)
    if count >= dimension:
        # All directions are needed, so none comes first; and further sets, since one cannot hold
        # them.
        return torch.cat([_random_orthonormal(part) for part in random.split(dimension)])
    taken = _unit_rows(previous, survivors)
    if len(taken) + count > dimension:
        signs = random[:, :1].sign() + (random[:, :1] == 0)
        return signs * _least_covered(_unit_rows(previous), _unit_rows(survivors), count)
    quick = _quickly_in_null_space(taken, random, generator)
    return _surely_in_null_space(taken.double(), random.double()) if quick is None else quick


def _random_orthonormal(normal: Tensor) -> Tensor:
    """Orthonormal rows, uniformly distributed: the Q of a QR decomposition, in half of its time.

    Below its diagonal, what a decomposition meets in a matrix of random numbers is just as random
    after the columns before it were dealt with, so the numbers can be taken as they are (Stewart,
    SIAM J. Numer. Anal. 17, 1980).

    Args:
        normal: standard normal numbers, shape (n, d) with n up to d.
    """
    columns = normal.T.tril()
    first = columns.diagonal()
    first += first == 0  # so that no column is zero
    lengths = torch.linalg.vector_norm(columns, dim=0)
    # The reflection of each column onto its first entry, as LAPACK writes it (larfg).
    target = torch.where(first > 0, -lengths, lengths)
    reflectors = columns / (first - target)
    return torch.linalg.householder_product(reflectors, 1 - first / target).T


def _unit_rows(*parts: Tensor) -> Tensor:
    """Rows of all parts, of length one, at least float32; rows of zero length left out."""
    parts = tuple(part.detach() for part in parts)
    sizes = [len(part) for part in parts]
    dtype = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    rows = parts[0].new_empty(sum(sizes), parts[0].shape[1], dtype=dtype)
    lengths = torch.cat([row_lengths(part) for part in parts])
    scales = lengths.reciprocal().to(dtype)
    for part, scale, place in zip(parts, scales.split(sizes), rows.split(sizes), strict=True):
        torch.mul(part, scale, out=place)
    there = lengths.flatten() > 0
    return rows if there.all() else rows[there]


def _quickly_in_null_space(
    taken: Tensor, random: Tensor, generator: torch.Generator
) -> Tensor | None:
    """Random orthonormal rows orthogonal to ``taken``, from Cholesky factors of products.

    Several times faster than QR decompositions, but exact only where neither the rows of ``taken``
    nor what is left of ``random`` come close to being dependent; so the result is checked.

    Returns:
        the rows, or None where they are not exact enough.
    """
    factor, failed = torch.linalg.cholesky_ex(_products(taken))
    # Small times large is the faster order, and its transpose the memory that LAPACK wants.
    left = random - torch.cholesky_solve((random @ taken.T).T, factor).T @ taken
    inner, failed_too = torch.linalg.cholesky_ex(_products(left))
    if failed or failed_too:
        return None
    eye = torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    rows = torch.linalg.solve_triangular(inner, eye, upper=False) @ left
    # A row's cosines with the others, summed with random signs: their root mean square times the
    # root of their number, on average, at a fraction of what all of them would cost. Not too many
    # at once, or the rounding of the sum would pass for an error.
    signs = 2.0 * torch.randint(0, 2, (len(rows), 8), generator=generator) - 1
    signs = torch.block_diag(*signs.split(_SUMMED)).T.to(rows.device, rows.dtype)
    mixed = signs @ rows
    errors = torch.cat([mixed @ taken.T, mixed @ rows.T - signs], dim=1).abs().max()
    # Written so that a NaN counts as not exact.
    return rows if errors <= _EXACT_ENOUGH * torch.finfo(rows.dtype).eps else None


def _products(rows: Tensor) -> Tensor:
    """``rows @ rows.T`` on and below the diagonal: all that Cholesky and ``eigh`` read."""
    products = rows.new_zeros(len(rows), len(rows))
    for columns, block in lower_products(rows):
        products[columns.start :, columns] = block
    return products


def _surely_in_null_space(taken: Tensor, random: Tensor) -> Tensor:
    """The same for any rows, by QR decompositions."""
    basis = torch.linalg.qr(taken.T).Q
    # Twice, since the first pass leaves rounding of the size of what it removes.
    for _ in range(2):
        random = random - (random @ basis) @ basis.T
    return torch.linalg.qr(random.T).Q.T


def _least_covered(old: Tensor, kept: Tensor, count: int) -> Tensor:
    """Orthonormal rows (count, d): what survivors cover least, and of that what ``old`` does."""
    # Where channels came back, no survivor reads them yet: these directions are known to be free.
    read = kept.any(dim=0)
    all_read = bool(read.all())
    coverage, directions = _ascending(kept if all_read else kept[:, read])
    free = int((coverage <= 1e-10).sum())

    def embedded(columns: Tensor) -> Tensor:
        if all_read:
            return columns
        whole = columns.new_zeros(len(read), columns.shape[1])
        whole[read] = columns
        return whole

    eye = torch.eye(len(read), dtype=directions.dtype, device=kept.device)
    space = torch.cat([eye[:, ~read], embedded(directions[:, :free])], dim=1)
    if space.shape[1] > count:
        inside = old.double() @ space.double()
        return (space.double() @ torch.linalg.eigh(inside.T @ inside).eigenvectors)[:, :count].T
    more = embedded(directions[:, free : free + count - space.shape[1]])
    return torch.cat([space, more], dim=1).T


def _ascending(kept: Tensor) -> tuple[Tensor, Tensor]:
    """How much rows cover each of d orthonormal directions (columns), the least first."""
    if len(kept) >= kept.shape[1]:
        coverage, directions = torch.linalg.eigh(_products(kept.T))
        if not len(coverage) or coverage[0] > 1e-3:
            return coverage, directions
    # float32 does not resolve which directions are not covered at all.
    return torch.linalg.eigh(_products(kept.T.double()))


def lengths_of(choice: Reinit, previous: Tensor, survivors: Tensor) -> Tensor:
    """Length of each new filter.

    Survivors of zero length do not count. Where the chosen length is unknown or zero, the other one
    is taken.

    Args:
        choice: ``norm`` and ``scale`` are used.
        previous: shape (p, d).
        survivors: shape (s, d).

    Returns:
        shape (p, 1), float64.
    """
    others = row_lengths(survivors)
    others = others[others > 0]
    mean = others.mean() if len(others) else others.new_zeros(())
    if choice.norm == "survivors" and len(others):
        return choice.scale * mean.expand(len(previous), 1)
    lengths = row_lengths(previous)
    return choice.scale * torch.where(lengths == 0, mean, lengths)
