"""Training batches for RePr's own use, which leave the run that they serve untouched."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset


class _RandomStream:
    """A random state of its own for Python, NumPy and torch, swapped in while it is entered."""

    def __init__(self, seed: int) -> None:
        with self._restored():
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
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
            with torch.random.fork_rng():
                yield
        finally:
            self._set(outside)

    @contextmanager
    def active(self) -> Iterator[None]:
        with self._restored():
            self._set(self._state)
            try:
                yield
            finally:
                self._state = self._current()


def _loader_of_its_own(loader: Any) -> Any:
    """A loader over the same data that shares no state with the given one, without workers."""
    if isinstance(loader, AspectRatioGroupedDataset):
        return AspectRatioGroupedDataset(_loader_of_its_own(loader.dataset), loader.batch_size)
    if isinstance(loader, DataLoader):
        order = (
            {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
            if isinstance(loader.dataset, IterableDataset) or loader.batch_size is not None
            else {"batch_sampler": loader.batch_sampler}
        )
        if "batch_size" in order and not isinstance(loader.dataset, IterableDataset):
            order["sampler"] = loader.sampler
        return DataLoader(loader.dataset, collate_fn=loader.collate_fn, **order)
    return copy.copy(loader)


def own_batches(loader: Any, seed: int) -> Callable[[], Iterator[Any]]:
    """What returns a fresh iterator of training batches, apart from the training iterator.

    Neither the order of the training data nor any random state outside changes.

    Args:
        loader: the training loader.
        seed: of the random augmentations.
    """

    def batches() -> Iterator[Any]:
        stream = _RandomStream(seed)
        with stream.active():
            iterator = iter(_loader_of_its_own(loader))
        while True:
            with stream.active():
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch

    return batches


def training_loss(model: nn.Module, batch: Any) -> Tensor:
    """The sum of the losses that a Detectron2 model returns in training mode, a scalar.

    What the model records on the way is thrown away.
    """
    with EventStorage():
        losses = model(batch)
    return losses if isinstance(losses, Tensor) else sum(losses.values())
