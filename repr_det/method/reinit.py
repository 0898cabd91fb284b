"""Back: orthogonal re-initialisation (paper, section 3 and Algorithm 1, line 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repr_det.method.filters import unit_rows
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
    rows = torch.cat([previous.detach(), survivors.detach()])
    units, _ = unit_rows(rows if rows.dtype == torch.float64 else rows.float())
    dropped = torch.arange(len(rows)) < len(previous)
    return directions_of_alike(units[None], dropped[None], [generator])[0]


def directions_of_alike(
    units: Tensor, dropped: Tensor, generators: Sequence[torch.Generator]
) -> list[Tensor]:
    """:func:`orthogonal_directions` for n sets of filters of one shape at once.

    Args:
        units: old values of dropped filters and current ones of survivors, shape (n, J, d), rows of
            length one or zero, float32 or float64.
        dropped: which rows are the dropped ones: bool of shape (n, J), on the CPU.
        generators: of each set.

    Returns:
        shape (p, d) for each set, p the number of its dropped filters.
    """
    _, width, dimension = units.shape
    counts = dropped.sum(dim=1).tolist()
    found: dict[int, Tensor] = {i: units[i, :0] for i, p in enumerate(counts) if p == 0}
    with_room = [i for i, p in enumerate(counts) if 0 < p <= dimension - width]
    everything = [i for i, p in enumerate(counts) if p >= dimension]

    if with_room:
        most = max(counts[i] for i in with_room)
        # float32 in any case: a random direction needs no more digits. More rows than some sets
        # need do no harm: each is made orthogonal to those before it.
        random = [torch.randn(most, dimension, generator=generators[i]) for i in with_room]
        some = units if len(with_room) == len(units) else units[with_room]
        random = _stacked(random).to(units)
        quick, exact = _quickly_in_null_space(some, random)
        for i, taken, own, rows, ok in zip(
            with_room, some, random, quick, exact.tolist(), strict=True
        ):
            rows = rows if ok else _surely_in_null_space(taken.double(), own.double())
            found[i] = rows[: counts[i]]

    # All directions are needed, so none comes first; and further sets, since one cannot hold them.
    sets = {
        i: torch.randn(counts[i], dimension, generator=generators[i]).split(dimension)
        for i in everything
    }
    made = iter(_random_orthonormal([one for some in sets.values() for one in some], units))
    found |= {i: torch.cat([next(made) for _ in some]) for i, some in sets.items()}

    for i in set(range(len(units))).difference(found):
        old, kept = (
            units[i].index_select(0, which.nonzero().flatten().to(units.device))
            for which in (dropped[i], ~dropped[i])
        )
        random = torch.randn(counts[i], dimension, generator=generators[i]).to(units)
        found[i] = _with_little_room(old, kept, random)
    return [found[i] for i in range(len(units))]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.stack``, without a copy of a single one."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def _random_orthonormal(normal: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Orthonormal rows, uniformly distributed: the Q of a QR decomposition, in half of its time.

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
        columns = _stacked([normal[i] for i in indices]).to(like).mT.tril()
        first = columns.diagonal(dim1=-2, dim2=-1)
        first += first == 0  # so that no column is zero
        lengths = torch.linalg.vector_norm(columns, dim=-2)
        # The reflection of each column onto its first entry, as LAPACK writes it (larfg).
        target = torch.where(first > 0, -lengths, lengths)
        reflectors = columns / (first - target)[..., None, :]
        made = torch.linalg.householder_product(reflectors, 1 - first / target).mT
        found |= zip(indices, made, strict=True)
    return [found[i] for i in range(len(normal))]


def _quickly_in_null_space(taken: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """Random orthonormal rows orthogonal to ``taken``, from Cholesky factors of products.

    Several times faster than QR decompositions, but exact only where neither the rows of ``taken``
    nor what is left of ``random`` come close to being dependent; so the result is checked.

    Args:
        taken: shape (n, J, d), rows of length one or zero.
        random: shape (n, p, d).

    Returns:
        rows of shape (n, p, d), and bool of shape (n,): where they are exact enough.
    """
    products = _products(taken)
    diagonal = products.diagonal(dim1=-2, dim2=-1)
    diagonal += diagonal == 0  # a zero row takes no part
    factor, failed = torch.linalg.cholesky_ex(products)
    # Small times large is the faster order, and its transpose the memory that LAPACK wants.
    left = random - torch.cholesky_solve((random @ taken.mT).mT, factor).mT @ taken
    inner, failed_too = torch.linalg.cholesky_ex(_products(left))
    eye = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
    rows = torch.linalg.solve_triangular(inner, eye, upper=False) @ left
    # A row's cosines with the others, summed with random signs: their root mean square times the
    # root of their number, on average, at a fraction of what all of them would cost. Not too many
    # at once, or the rounding of the sum would pass for an error.
    signs = torch.randint(0, 2, (len(eye), 8), generator=torch.Generator().manual_seed(0))
    signs = torch.block_diag(*(2.0 * signs - 1).split(_SUMMED)).T.to(rows)
    mixed = signs @ rows
    errors = torch.cat([mixed @ taken.mT, mixed @ rows.mT - signs], dim=-1).abs().amax((-2, -1))
    # Written so that a NaN counts as not exact.
    exact = errors <= _EXACT_ENOUGH * torch.finfo(rows.dtype).eps
    return rows, exact & (failed == 0) & (failed_too == 0)


def _products(rows: Tensor) -> Tensor:
    """``rows @ rows.mT`` on and below the diagonal: all that Cholesky and ``eigh`` read."""
    products = rows.new_zeros(*rows.shape[:-1], rows.shape[-2])
    for columns, block in lower_products(rows):
        products[..., columns.start :, columns] = block
    return products


def _surely_in_null_space(taken: Tensor, random: Tensor) -> Tensor:
    """The same for any rows, by QR decompositions."""
    basis = torch.linalg.qr(taken[taken.any(dim=1)].T).Q
    # Twice, since the first pass leaves rounding of the size of what it removes.
    for _ in range(2):
        random = random - (random @ basis) @ basis.T
    return torch.linalg.qr(random.T).Q.T


def _with_little_room(old: Tensor, kept: Tensor, random: Tensor) -> Tensor:
    """Orthonormal rows, as many as ``random`` has, where there may be fewer free directions."""
    taken = torch.cat([old, kept])
    if int(taken.any(dim=1).sum()) + len(random) <= random.shape[1]:
        return _surely_in_null_space(taken.double(), random.double())
    signs = random[:, :1].sign() + (random[:, :1] == 0)
    return signs * _least_covered(old, kept, len(random))


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
    mean = (lengths * others).sum(dim=-1, keepdim=True) / others.sum(dim=-1, keepdim=True)
    replaced = (lengths == 0) | (known & (choice.norm == "survivors"))
    return choice.scale * torch.where(replaced, torch.where(known, mean, 0.0), lengths)
