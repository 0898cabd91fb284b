"""Random states that depend on seed and iteration only, not on what ran before."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mixed_seed(*parts: int) -> int:
    """One seed of 32 bits from several numbers, such as seed, iteration and rank."""
    return int(np.random.SeedSequence([part % 2**32 for part in parts]).generate_state(1)[0])


class RandomStream:
    """A separate random state for Python, NumPy and torch on the CPU; see :meth:`active`.

    Args:
        seed: of 32 bits.
    """

    def __init__(self, seed: int) -> None:
        with self._restored():
            random.seed(seed)
            np.random.seed(seed)
            # Not torch.manual_seed, which would also seed the GPUs.
            torch.default_generator.manual_seed(seed)
            self._state = self._current()

    @staticmethod
    def _current() -> tuple:
        return random.getstate(), np.random.get_state(), torch.get_rng_state()

    @staticmethod
    def _set(state: tuple) -> None:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])

    @contextmanager
    def _restored(self) -> Iterator[None]:
        outside = self._current()
        try:
            yield
        finally:
            self._set(outside)

    @contextmanager
    def active(self) -> Iterator[None]:
        """While inside, draw from this stream. The state outside does not change."""
        with self._restored():
            self._set(self._state)
            try:
                yield
            finally:
                self._state = self._current()


def use_deterministic_algorithms() -> None:
    """Make torch's operations return the same bits each time, also on a GPU."""
    # cuBLAS reads this variable when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
