"""Works on many layers at once, on the cores of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def over_layers(work: Callable[[Any], Any], layers: Sequence[Any]) -> list[Any]:
    """``[work(layer) for layer in layers]``, without gradients and autocast.

    On a CPU, several layers are worked on at a time, each by one thread: the matrices of a layer
    are too small for several threads. So results are the same for any number of cores.

    Args:
        work: must not depend on the order of the layers.
        layers: filter layers or readers.
    """

    def on_one(layer: Any) -> Any:
        with torch.no_grad(), torch.autocast(layer.module.weight.device.type, enabled=False):
            return work(layer)

    threads = torch.get_num_threads()
    if threads == 1 or any(layer.module.weight.is_cuda for layer in layers):
        return [on_one(layer) for layer in layers]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(on_one, layers))
    finally:
        torch.set_num_threads(threads)
