"""Works on many layers at once, on the cores of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
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
    threads = torch.get_num_threads()
    devices = {layer.module.weight.device.type for layer in layers}
    if threads == 1 or "cuda" in devices:
        with ExitStack() as settings:
            settings.enter_context(torch.no_grad())
            for device in devices:
                settings.enter_context(torch.autocast(device, enabled=False))
            return [work(layer) for layer in layers]
    # The largest layer first: at the end it would occupy one core while the others wait.
    order = sorted(range(len(layers)), key=lambda i: -layers[i].module.weight.numel())
    torch.set_num_threads(1)
    try:
        # New threads have no autocast, but gradients.
        with ThreadPoolExecutor(threads, "layers", torch.set_grad_enabled, (False,)) as pool:
            futures = {i: pool.submit(work, layers[i]) for i in order}
            return [futures[i].result() for i in range(len(layers))]
    finally:
        torch.set_num_threads(threads)
