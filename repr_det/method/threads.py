"""Work on many layers, spread over the cores of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from repr_det.method.filters import FilterLayer

Result = TypeVar("Result")


def over_layers(
    work: Callable[[FilterLayer], Result], layers: Sequence[FilterLayer]
) -> list[Result]:
    """``[work(layer) for layer in layers]``, on a CPU several layers at a time, without gradients.

    The matrices of a layer are too small for torch to make good use of several threads in one
    operation. With one thread an operation, results do not hang on the number of threads either.

    Args:
        work: must not depend on the order of the layers.
        layers: the filter layers.
    """

    def without_gradients(layer: FilterLayer) -> Result:
        with torch.no_grad():  # a setting of each thread
            return work(layer)

    threads = torch.get_num_threads()
    if threads == 1 or any(layer.weight.is_cuda for layer in layers):
        return [without_gradients(layer) for layer in layers]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(without_gradients, layers))
    finally:
        torch.set_num_threads(threads)
