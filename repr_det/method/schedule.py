"""The schedule: from an iteration to its phase."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

from repr_det.errors import UserError

FULL = "full"
SUB = "sub"


class Phase(NamedTuple):
    """The phase of an iteration.

    Attributes:
        name: ``"full"`` (S1, and the tail after the last cycle) or ``"sub"`` (S2).
        cycle: 0 .. cycles - 1; the tail has ``cycle == cycles``.
    """

    name: str
    cycle: int


@dataclass(frozen=True)
class RePrSchedule:
    """RePr's training schedule (paper, Algorithm 1), in iterations.

    ``cycles`` times: ``s1`` iterations of the full network, then ``s2`` iterations of the
    sub-network. After the last cycle the full network trains to the end.

    Attributes:
        s1: iterations of the full network in a cycle, at least 1.
        s2: iterations of the sub-network in a cycle, at least 1.
        cycles: number of cycles (the paper's N), at least 1.

    Raises:
        UserError: a length or count that is not a whole number of at least 1.
    """

    s1: int
    s2: int
    cycles: int

    def __post_init__(self) -> None:
        for name in ("s1", "s2", "cycles"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise UserError(
                    f"RePr schedule: {name} is {value!r}. Set a whole number of at least 1."
                )
            object.__setattr__(self, name, int(value))  # NumPy's numbers overflow

    @property
    def end(self) -> int:
        """The first iteration of the tail: ``cycles * (s1 + s2)``."""
        return self.cycles * (self.s1 + self.s2)

    def phase(self, iteration: int) -> Phase:
        """The phase of an iteration, counted from 0."""
        iteration = int(iteration)
        if iteration >= self.end:
            return Phase(FULL, self.cycles)
        cycle, offset = divmod(iteration, self.s1 + self.s2)
        return Phase(FULL if offset < self.s1 else SUB, cycle)

    def since_return(self, iteration: int) -> int | None:
        """Iterations since the last return; None before the first one."""
        returns = min(iteration // (self.s1 + self.s2), self.cycles)
        return iteration - returns * (self.s1 + self.s2) if returns else None

    def sub_spans(self) -> list[tuple[int, int]]:
        """The S2 spans as half-open ranges of iterations ``[begin, end)``."""
        period = self.s1 + self.s2
        return [(c * period + self.s1, (c + 1) * period) for c in range(self.cycles)]

    def check_fits(self, max_iter: int, warmup: int = 0) -> None:
        """Refuse a training length that would end in S2, or while the learning rate warms up.

        Args:
            max_iter: the length in iterations.
            warmup: iterations of a warm-up after each return.

        Raises:
            UserError: ``cycles * (s1 + s2)`` is not smaller than ``max_iter``, or
                ``cycles * (s1 + s2) + warmup`` is larger.
        """
        if self.end >= max_iter:
            raise UserError(
                f"RePr needs N * (S1 + S2) = {self.cycles} * ({self.s1} + {self.s2}) = {self.end} "
                f"iterations and then some of the full network, but training ends after "
                f"{max_iter}. Lower N, S1 or S2, or train longer."
            )
        if self.end + warmup > max_iter:
            raise UserError(
                f"RePr: training ends after {max_iter} iterations, in the warm-up of {warmup} that "
                f"follows the last return at {self.end}. Lower warmup, N, S1 or S2, or train "
                f"longer."
            )
