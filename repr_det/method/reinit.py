"""Back: orthogonal re-initialisation (paper, section 3 and Algorithm 1, line 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from repr_det.errors import UserError
from repr_det.method.products import lower_products

DIRECTION_CHOICES = ("orthogonal", "previous")
NORM_CHOICES = ("survivors", "previous")
GAMMA_CHOICES = ("survivors", "one", "previous")
BETA_CHOICES = ("zero", "survivors", "previous")


@dataclass(frozen=True)
class Reinit:
    """What a returned filter starts with. The paper sets the direction and names nothing else.

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
                    f"RePr re-initialisation: {name} is {getattr(self, name)!r}; "
                    f"give one of {', '.join(choices)}."
                )
        if not self.scale > 0:
            raise UserError(f"RePr re-initialisation: scale is {self.scale}; give a value above 0.")
        if not 0 <= self.outgoing <= 1:
            raise UserError(
                f"RePr re-initialisation: outgoing is {self.outgoing}; give a value from 0 to 1."
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


_EXACT_ENOUGH = 40
"""What may be left of a row's cosines, in units of rounding: 5e-6 in float32; 1e-5 is promised."""

_SUMMED = 128
"""Rows that are checked at once."""


def orthogonal_directions(
    units: Tensor, dropped: Tensor, generators: Sequence[torch.Generator]
) -> list[Tensor]:
    """New unit filters, orthogonal to the dropped filters' old values and to the survivors.

    While the null space of both has room for all of them, the new filters are a random orthonormal
    set in it. Where it has not, they take the null space first, then the directions that the
    survivors cover least, and stay orthonormal among themselves up to ``d`` of them.

    Args:
        units: n sets of J filters each, old values of dropped ones and current ones of survivors:
            shape (n, J, d), rows of length one or zero, float32 or float64.
        dropped: which are the dropped ones: bool of shape (n, J), on the CPU.
        generators: CPU source of the random directions of each set, in turn; one may serve several.

    Returns:
        shape (p, d) for each set, p the number of its dropped filters, like ``units`` otherwise.
    """
    _, width, dimension = units.shape
    counts = dropped.sum(dim=1).tolist()
    # float32 in any case: a random direction needs no more digits.
    normal = [
        torch.randn(p, dimension, generator=g) for p, g in zip(counts, generators, strict=True)
    ]
    found: dict[int, Tensor] = {i: units[i, :0] for i, p in enumerate(counts) if p == 0}

    if roomy := [i for i, p in enumerate(counts) if 0 < p <= dimension - width]:
        random = pad_sequence([normal[i] for i in roomy], batch_first=True).to(units)
        taken = units if len(roomy) == len(units) else units[roomy]
        quick, exact = _quickly_in_null_space(taken, random)
        for place, (i, is_exact) in enumerate(zip(roomy, exact.tolist(), strict=True)):
            own = slice(counts[i])
            found[i] = (
                quick[place, own]
                if is_exact
                else _surely_in_null_space(taken[place].double(), random[place, own].double())
            )

    # All directions are needed, so none comes first; and further ones, since one basis cannot hold
    # that many filters.
    crowded = [i for i, p in enumerate(counts) if p >= dimension]
    parts = {i: normal[i].split(dimension) for i in crowded}
    made = iter(_random_orthonormal([part for i in crowded for part in parts[i]], units))
    found |= {i: torch.cat([next(made) for _ in parts[i]]) for i in crowded}

    for i in set(range(len(units))).difference(found):
        found[i] = _with_little_room(units[i], dropped[i], normal[i].to(units))
    return [found[i].to(units.dtype) for i in range(len(units))]


def _random_orthonormal(normal: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Orthonormal rows, uniformly distributed, in less time than large QR decompositions take.

    Below its diagonal, what a decomposition meets in a matrix of random numbers is just as random
    after the columns before it were dealt with, so the numbers can be taken as they are (Stewart,
    SIAM J. Numer. Anal. 17, 1980).

    Args:
        normal: standard normal numbers, each of a shape (n, d) with n up to d.
        like: has the dtype and the device that the rows shall have.

    Returns:
        of the same shapes.
    """
    by_size: dict[int, list[int]] = {}
    for index, one in enumerate(normal):
        by_size.setdefault(len(one), []).append(index)
    found: dict[int, Tensor] = {}
    for indices in by_size.values():
        columns = torch.stack([normal[i] for i in indices]).to(like).mT.tril()
        first = columns.diagonal(dim1=-2, dim2=-1)
        first += first == 0  # so that no column is zero
        lengths = torch.linalg.vector_norm(columns, dim=-2)
        # The reflection of each column onto its first entry, as LAPACK writes it (larfg).
        target = torch.where(first > 0, -lengths, lengths)
        reflectors = columns / (first - target)[..., None, :]
        made = torch.linalg.householder_product(reflectors, 1 - first / target).mT
        found |= zip(indices, made * _signs(target), strict=True)
    return [found[i] for i in range(len(normal))]


def _signs(diagonal: Tensor) -> Tensor:
    """What makes the rows of an orthogonal factor those that go with a positive diagonal.

    Of random numbers only these are uniformly distributed; LAPACK chooses signs that round best.
    """
    return torch.where(diagonal < 0, -1.0, 1.0).to(diagonal.dtype)[..., None]


def _quickly_in_null_space(taken: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """Random orthonormal rows orthogonal to ``taken``, from Cholesky factors of products.

    Several times faster than QR decompositions, but exact only where neither the rows of ``taken``
    nor what is left of ``random`` come close to being dependent; so the result is checked.

    Args:
        taken: shape (n, J, d), rows of length one or zero.
        random: shape (n, p, d); zero rows fill up where a set needs fewer, and stay zero.

    Returns:
        rows of shape (n, p, d), and bool of shape (n,): where they are exact enough.
    """
    factor, failed = torch.linalg.cholesky_ex(_positive(_products(taken)))
    # Small times large is the faster order, and its transpose the memory that LAPACK wants.
    left = random - torch.cholesky_solve((random @ taken.mT).mT, factor).mT @ taken
    products = _products(left)
    there = products.diagonal(dim1=-2, dim2=-1) > 0
    inner, failed_too = torch.linalg.cholesky_ex(_positive(products))
    eye = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
    rows = torch.linalg.solve_triangular(inner, eye, upper=False) @ left
    # A row's cosines with the others, summed with random signs: their root mean square times the
    # root of their number, on average, at a fraction of what all of them would cost. Not too many
    # at once, or the rounding of the sum would pass for an error.
    signs = torch.randint(0, 2, (len(eye), 8), generator=torch.Generator().manual_seed(0))
    signs = torch.block_diag(*(2.0 * signs - 1).split(_SUMMED)).T.to(rows) * there[:, None]
    mixed = signs @ rows
    errors = torch.cat([mixed @ taken.mT, mixed @ rows.mT - signs], dim=-1).abs().amax((-2, -1))
    # Written so that a NaN counts as not exact.
    exact = errors <= _EXACT_ENOUGH * torch.finfo(rows.dtype).eps
    return rows, exact & (failed == 0) & (failed_too == 0)


def _positive(products: Tensor) -> Tensor:
    """Products of rows with each other, in place, where zero rows shall take no part."""
    diagonal = products.diagonal(dim1=-2, dim2=-1)
    diagonal += diagonal == 0
    return products


def _products(rows: Tensor) -> Tensor:
    """``rows @ rows.mT`` on and below the diagonal: all that Cholesky and ``eigh`` read."""
    products = rows.new_zeros(*rows.shape[:-1], rows.shape[-2])
    for columns, block in lower_products(rows):
        products[..., columns.start :, columns] = block
    return products


def _surely_in_null_space(taken: Tensor, random: Tensor) -> Tensor:
    """Like :func:`_quickly_in_null_space`, for one set of any rows, by QR decompositions."""
    basis = torch.linalg.qr(taken[taken.any(dim=1)].T).Q
    # Twice, since the first pass leaves rounding of the size of what it removes.
    for _ in range(2):
        random = random - (random @ basis) @ basis.T
    factor, triangle = torch.linalg.qr(random.T)
    return factor.T * _signs(triangle.diagonal())


def _with_little_room(units: Tensor, dropped: Tensor, random: Tensor) -> Tensor:
    """Orthonormal rows, as many as ``random`` has, where there may be fewer free directions."""
    there = int((torch.linalg.vector_norm(units, dim=1) > 0).sum())
    if there + len(random) <= units.shape[1]:
        return _surely_in_null_space(units.double(), random.double())
    old, kept = (
        units.index_select(0, which.nonzero().flatten().to(units.device))
        for which in (dropped, ~dropped)
    )
    # Directions without a sense get one by chance.
    return _signs(random[:, 0]) * _least_covered(old, kept, len(random))


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


def lengths_of(choice: Reinit, lengths: Tensor, dropped: Tensor) -> Tensor:
    """Length of each filter as a new one.

    Survivors of zero length do not count. Where the chosen length is unknown or zero, the other one
    is taken.

    Args:
        choice: ``norm`` and ``scale`` are used.
        lengths: of old values of dropped filters and of survivors, shape (..., J), float64.
        dropped: which are the dropped ones, bool of the same shape.

    Returns:
        of the same shape; what it says of survivors has no meaning.
    """
    others = ~dropped & (lengths > 0)
    known = others.any(dim=-1, keepdim=True)
    total = torch.where(others, lengths, 0.0).sum(dim=-1, keepdim=True)
    mean = total / others.sum(dim=-1, keepdim=True)
    replaced = (lengths == 0) | (known & (choice.norm == "survivors"))
    return choice.scale * torch.where(replaced, torch.where(known, mean, 0.0), lengths)
