"""Work on many layers, spread over the cores of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch


def over_layers(work: Callable[[Any], Any], layers: Sequence[Any]) -> list[Any]:
    """``[work(layer) for layer in layers]``, on a CPU several layers at a time.

    Without gradients and autocast.

    The matrices of a layer are too small for torch to make good use of several threads in one
    operation. Each operation then runs on one thread, so results are the same for any number of
    cores.

    Args:
        work: must not depend on the order of the layers.
        layers: what has its weight in a ``module``: filter layers, or what reads them.
    """
    threads = torch.get_num_threads()
    devices = {layer.module.weight.device.type for layer in layers}
    if threads == 1 or "cuda" in devices:
        with ExitStack() as settings:
            settings.enter_context(torch.no_grad())
            for device in devices:
                settings.enter_context(torch.autocast(device, enabled=False))
            return [work(layer) for layer in layers]
    # The largest first, or one core would be left alone with it at the end.
    order = sorted(range(len(layers)), key=lambda i: -layers[i].module.weight.numel())
    torch.set_num_threads(1)
    try:
        # A new thread is without autocast, but with gradients.
        with ThreadPoolExecutor(threads, "layers", torch.set_grad_enabled, (False,)) as pool:
            futures = {i: pool.submit(work, layers[i]) for i in order}
            return [futures[i].result() for i in range(len(layers))]
    finally:
        torch.set_num_threads(threads)
