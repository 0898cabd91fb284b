"""Work on many layers, spread over the cores of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch
from torch import nn


class _Layer(Protocol):
    @property
    def module(self) -> nn.Module: ...


Layer = TypeVar("Layer", bound=_Layer)
Result = TypeVar("Result")


def over_layers(work: Callable[[Layer], Result], layers: Sequence[Layer]) -> list[Result]:
    """``[work(layer) for layer in layers]``, on a CPU several layers at a time.

    Without gradients and autocast.

    The matrices of a layer are too small for torch to make good use of several threads in one
    operation. With one thread an operation, results do not hang on the number of threads either.

    Args:
        work: must not depend on the order of the layers.
        layers: what has its weight in a ``module``: filter layers, or what reads them.
    """

    def undisturbed(layer: Layer) -> Result:
        # Both are settings of each thread.
        with torch.no_grad(), torch.autocast(layer.module.weight.device.type, enabled=False):
            return work(layer)

    threads = torch.get_num_threads()
    weights = [layer.module.weight for layer in layers]
    if threads == 1 or any(weight.is_cuda for weight in weights):
        return [undisturbed(layer) for layer in layers]
    # The largest first, or one core would be left alone with it at the end.
    order = sorted(range(len(layers)), key=lambda i: -weights[i].numel())
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            futures = {i: pool.submit(undisturbed, layers[i]) for i in order}
            return [futures[i].result() for i in range(len(layers))]
    finally:
        torch.set_num_threads(threads)
