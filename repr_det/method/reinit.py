"""Back: orthogonal re-initialisation (paper, section 3 and Algorithm 1, line 6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
            without influence.

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
        shape (p, d), float64, unit rows, on the device of ``previous``.
    """
    count, dimension = previous.shape
    old, kept = _unit_rows(previous), _unit_rows(survivors)
    random = torch.randn(dimension, count, generator=generator, dtype=torch.float64)
    random = random.to(old.device)
    if len(old) + len(kept) + count <= dimension:
        return _random_in_null_space(torch.cat([old, kept]), random)
    return _least_covered(old, kept, random)


def _unit_rows(rows: Tensor) -> Tensor:
    """Rows of length one in float64; rows of zero length left out."""
    rows = rows.detach().double()
    lengths = rows.norm(dim=1, keepdim=True)
    return (rows / lengths)[lengths.flatten() > 0]


def _random_in_null_space(taken: Tensor, random: Tensor) -> Tensor:
    basis = torch.linalg.qr(taken.T).Q
    # Twice, since the first pass leaves rounding of the size of what it removes.
    for _ in range(2):
        random = random - basis @ (basis.T @ random)
    return torch.linalg.qr(random).Q.T


def _least_covered(old: Tensor, kept: Tensor, random: Tensor) -> Tensor:
    dimension, count = random.shape
    coverage, directions = torch.linalg.eigh(kept.T @ kept)
    free = int((coverage <= 1e-10).sum())
    if free:
        # Among what no survivor covers, what the old values cover least comes first.
        space = directions[:, :free]
        inside = old @ space
        order = torch.linalg.eigh(inside.T @ inside).eigenvectors
        directions = torch.cat([space @ order, directions[:, free:]], dim=1)
    signs = random[0].sign()
    signs[signs == 0] = 1
    chosen = [directions[:, :count]]
    while (missing := count - sum(block.shape[1] for block in chosen)) > 0:
        # More new filters than dimensions: further orthonormal sets, since one cannot hold them.
        done = count - missing
        square = torch.linalg.qr(random[:, done : done + dimension]).Q
        chosen.append(square[:, :missing])
    return (torch.cat(chosen, dim=1) * signs).T


def lengths_of(choice: Reinit, previous: Tensor, survivors: Tensor) -> Tensor:
    """Length of each new filter.

    Args:
        choice: ``norm`` and ``scale`` are used.
        previous: shape (p, d).
        survivors: shape (s, d); where there is none, the previous lengths are used.

    Returns:
        shape (p, 1), float64.
    """
    lengths = previous.double().norm(dim=1, keepdim=True)
    if choice.norm == "survivors" and len(survivors):
        lengths = survivors.double().norm(dim=1).mean().expand_as(lengths)
    return choice.scale * lengths
