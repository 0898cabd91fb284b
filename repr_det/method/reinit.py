"""Back: orthogonal re-initialisation (paper, section 3 and Algorithm 1, line 6)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from repr_det.errors import UserError

DIRECTION_CHOICES = ("orthogonal", "previous")
NORM_CHOICES = ("survivors", "previous")
GAMMA_CHOICES = ("survivors", "one", "previous")
BETA_CHOICES = ("zero", "survivors", "previous")


@dataclass(frozen=True)
class Reinit:
    """What a returned filter starts with. The paper defines only the direction.

    Attributes:
        direction: ``"orthogonal"``, as in the paper, or ``"previous"``, which is ours: a filter
            returns as it was at the drop, with its weights, bias, gamma, beta, running statistics
            and the weights that read it. Its optimizer state is reset. The other fields do not
            apply then and must have their defaults.
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
        UserError: a value outside of these, or one that ``direction="previous"`` ignores.
    """

    direction: str = "orthogonal"
    norm: str = "survivors"
    scale: float = 1.0
    gamma: str = "survivors"
    beta: str = "zero"
    outgoing: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in (
            ("direction", DIRECTION_CHOICES), ("norm", NORM_CHOICES),
            ("gamma", GAMMA_CHOICES), ("beta", BETA_CHOICES),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise UserError(
                    f"RePr re-initialisation: {name} is {getattr(self, name)!r}. "
                    f"Set one of {', '.join(choices)}."
                )
        if not self.scale > 0:
            raise UserError(f"RePr re-initialisation: scale is {self.scale}. Set a value above 0.")
        if not 0 <= self.outgoing <= 1:
            raise UserError(
                f"RePr re-initialisation: outgoing is {self.outgoing}. Set a value from 0 to 1."
            )
        if self.as_it_was:
            for field in fields(self)[1:]:
                if getattr(self, field.name) != field.default:
                    raise UserError(
                        f"RePr re-initialisation: {field.name} is {getattr(self, field.name)!r}, "
                        f"but with direction 'previous' filters return as they were. Leave "
                        f"{field.name} at its default, {field.default!r}."
                    )

    @property
    def as_it_was(self) -> bool:
        """Whether filters return as they were at the drop."""
        return self.direction == "previous"


def reinit_of(given: Any) -> Reinit:
    """An argument ``reinit``; None is the default.

    Raises:
        UserError: it is something else, for example the name of a direction.
    """
    if given is not None and not isinstance(given, Reinit):
        raise UserError(
            f"RePr: reinit is {given!r}. Set a Reinit, for example Reinit(direction='previous')."
        )
    return given or Reinit()


_SHORTEST = {torch.float32: 3e-6, torch.float64: 1e-7}
"""Unit filters count as dependent if a combination of them (a unit vector of factors) is at most
this long, since rounding alone makes it so long. New filters may overlap with them by as much."""

_STURDY = 1e-3
"""Where no combination is shorter, a Cholesky decomposition makes a basis. It is orthonormal up to
about 1e-8. Projected twice, new filters are orthogonal up to the square of that."""

_ALIKE = 1e-4
"""Filters cover two directions alike where their singular values differ by no more than this."""


def orthogonal_directions(units: Tensor, dropped: Tensor, generator: torch.Generator) -> Tensor:
    """New unit filters, orthogonal to the dropped filters' old values and to the survivors.

    While the null space of both has room for all of them, the new filters are a random orthonormal
    set in it. Where it has not, they are orthonormal up to ``d`` of them, and take in turn:

    1. the null space of both,
    2. of the null space of the survivors, what the old values cover least,
    3. what the survivors cover least.

    Which they are depends on the seed, and not on rounding. The filters decide which subspaces are
    taken. Inside them, random numbers are projected and orthonormalised, so that no single
    eigenvector decides. Of directions that are covered alike, chance takes as many as are needed.
    Rounding of the filters moves the new ones by about as much, divided by how clearly a subspace
    stands out: by the smallest singular value of what is avoided, or by the step between those of
    what is taken and what is left.

    Args:
        units: old values of dropped filters and current ones of survivors, rows of length one or
            zero: shape (J, d), float32 or float64.
        dropped: which are the dropped ones: bool of shape (J,).
        generator: CPU source of the random numbers.

    Returns:
        shape (p, d), p the number of dropped filters, like ``units`` otherwise.
    """
    dropped = dropped.to(units.device)
    count, dimension = int(dropped.sum()), units.shape[1]
    # Always float32: a random direction needs no more digits.
    normal = torch.randn(count, dimension, generator=generator).to(units.device, torch.float64)
    if count >= dimension:  # all directions are needed, and one basis may not hold all filters
        new = [_orthonormal(part) for part in normal.split(dimension)]
    elif len(units) + count <= dimension:
        taken, _ = _span(units.double(), dimension, _SHORTEST[units.dtype])
        new = [_orthonormal(_without(normal, taken))]
    else:
        old, kept = units[dropped].double(), units[~dropped].double()
        new = _with_little_room(old, kept, normal, _SHORTEST[units.dtype])
    return torch.cat(new).to(units.dtype)


def _with_little_room(old: Tensor, kept: Tensor, normal: Tensor, shortest: float) -> list[Tensor]:
    """Orthonormal rows in the subspaces of :func:`orthogonal_directions`, a tensor for each."""
    count, dimension = normal.shape
    taken, lengths = _span(kept, dimension - count, shortest)
    covered = taken
    if (room := dimension - taken.shape[1]) >= count:
        covered, lengths = _span(_without(old, taken), room - count, shortest)
        taken = torch.cat([taken, covered], dim=1)
    free = min(dimension - taken.shape[1], count)
    new = [_orthonormal(_without(normal[:free], taken))]
    if (more := count - free) > 0:
        differs = (lengths.diff() > _ALIKE).nonzero().flatten() + 1
        borders = [0, *differs.tolist(), len(lengths)]
        # All of the directions before `begin` are taken, and some of those from there to `end`.
        begin = max(border for border in borders if border <= more)
        end = min(border for border in borders if border >= more)
        for rows, basis in (
            (normal[free : free + begin], covered[:, :begin]),
            (normal[free + begin :], covered[:, begin:end]),
        ):
            new.append(_orthonormal(rows @ basis) @ basis.T)
    return new


def _span(rows: Tensor, room: int, shortest: float) -> tuple[Tensor, Tensor]:
    """What rows (n, d) span: an orthonormal basis, and how much they cover each of its directions.

    Returns:
        columns (d, r), and their singular values (r,), the smallest first; without these
        (shape (0,)) where the rows are independent and at most ``room``.
    """
    rows = rows[rows.any(dim=1)]
    if len(rows) <= room:
        triangle, failed = torch.linalg.cholesky_ex(rows @ rows.T)
        eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        inverse = torch.linalg.solve_triangular(triangle, eye, upper=False)
        # 1 / norm is a lower bound of the singular values.
        if not failed and torch.linalg.matrix_norm(inverse) < 1 / _STURDY:
            return (inverse @ rows).T, rows.new_empty(0)
    wide = len(rows) < rows.shape[1]
    squares, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    lengths = squares.clamp(min=0).sqrt()
    there = lengths > shortest
    vectors = vectors[:, there]
    return torch.linalg.qr(rows.T @ vectors).Q if wide else vectors, lengths[there]


def _without(rows: Tensor, basis: Tensor) -> Tensor:
    """Rows less what of them is in the space of orthonormal columns."""
    # Twice, since the first pass leaves rounding of the size of what it removes.
    for _ in range(2):
        rows = rows - (rows @ basis) @ basis.T
    return rows


def _orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows, each the rest of one of ``rows`` without those before it."""
    factor, triangle = torch.linalg.qr(rows.T)
    # LAPACK chooses signs that round best.
    return (factor * torch.where(triangle.diagonal() < 0, -1.0, 1.0)).T


def lengths_of(choice: Reinit, lengths: Tensor, dropped: Tensor) -> Tensor:
    """Length of each filter as a new one.

    Survivors of zero length do not count. Where the chosen length is unknown or zero, the other one
    is taken.

    Args:
        choice: ``norm`` and ``scale`` are used.
        lengths: of old values of dropped filters and of survivors, shape (..., J), float64.
        dropped: which are the dropped ones, bool of the same shape.

    Returns:
        of the same shape; entries of survivors have no meaning.
    """
    others = ~dropped & (lengths > 0)
    known = others.any(dim=-1, keepdim=True)
    total = torch.where(others, lengths, 0.0).sum(dim=-1, keepdim=True)
    mean = total / others.sum(dim=-1, keepdim=True)
    replaced = (lengths == 0) | (known & (choice.norm == "survivors"))
    return choice.scale * torch.where(replaced, torch.where(known, mean, 0.0), lengths)
