"""Products of a layer's filters with each other."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_BLOCK = 64
"""Rows whose products with the others are computed at once: what the cache of a CPU holds."""

_BLOCK_ON_GPU = 1024
"""There each product costs the time to launch it."""


def lower_products(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """``rows @ rows^T`` on and below its diagonal, a block of columns at a time.

    The product is symmetric, so the rest is known; about half of the work is saved.

    Args:
        rows: shape (..., J, d).

    Yields:
        the columns, and rows from the first of them on: shape (..., J - columns.start, columns).
    """
    size = _BLOCK_ON_GPU if rows.is_cuda else _BLOCK
    for begin in range(0, rows.shape[-2], size):
        columns = slice(begin, begin + size)
        yield columns, rows[..., begin:, :] @ rows[..., columns, :].mT
