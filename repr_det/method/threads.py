"""Work on many layers, spread over the cores of a CPU or put together for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import nn


class _Layer(Protocol):
    @property
    def module(self) -> nn.Module: ...


class _Shaped(_Layer, Protocol):
    @property
    def shape(self) -> Hashable: ...


_BATCH = 2**24
"""Weights in one batch of layers, at most: copies of them shall not count beside training."""

Layer = TypeVar("Layer", bound=_Layer)
Shaped = TypeVar("Shaped", bound=_Shaped)
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


class _Batch(NamedTuple):
    layers: list[Any]

    @property
    def module(self) -> nn.Module:
        return self.layers[0].module


def over_batches(
    work: Callable[[Sequence[Shaped]], Sequence[Result]], layers: Sequence[Shaped]
) -> list[Result]:
    """``work(layers)``, on a GPU with all layers of one shape at once, on a CPU layer by layer.

    Operations on one layer take a GPU no longer than it takes to launch them.

    Args:
        work: returns one result for each layer, which must not depend on the other layers.
        layers: as for :func:`over_layers`, filter layers for example.
    """
    batches: dict[Hashable, list[int]] = {}
    for index, layer in enumerate(layers):
        weight = layer.module.weight
        key = (layer.shape, weight.dtype, weight.device) if weight.is_cuda else index
        batches.setdefault(key, []).append(index)
    parts: list[list[int]] = []
    for indices in batches.values():
        size = max(1, _BATCH // layers[indices[0]].module.weight.numel())
        parts += [indices[i : i + size] for i in range(0, len(indices), size)]
    found = over_layers(
        lambda batch: work(batch.layers), [_Batch([layers[i] for i in part]) for part in parts]
    )
    by_index = {
        index: result
        for part, results in zip(parts, found, strict=True)
        for index, result in zip(part, results, strict=True)
    }
    return [by_index[index] for index in range(len(layers))]
