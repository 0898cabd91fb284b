"""Training batches for RePr's own use, which leave the run that they serve untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from detectron2.data.common import AspectRatioGroupedDataset, _MapIterableDataset
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from repr_det.engine.randomness import RandomStream


def _loader_of_its_own(loader: Any) -> Any:
    """A loader over the same data, from its beginning, that shares no state with the given one."""
    if isinstance(loader, AspectRatioGroupedDataset):
        return AspectRatioGroupedDataset(_loader_of_its_own(loader.dataset), loader.batch_size)
    if isinstance(loader, _MapIterableDataset):
        return type(loader)(_loader_of_its_own(loader._dataset), loader._map_func)
    if isinstance(loader, DataLoader):
        if isinstance(loader.dataset, IterableDataset):
            order = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        elif loader.batch_size is None:
            order = {"batch_size": None, "sampler": copy.deepcopy(loader.sampler)}
        else:
            order = {"batch_sampler": copy.deepcopy(loader.batch_sampler)}
        return DataLoader(loader.dataset, collate_fn=loader.collate_fn, **order)
    own = copy.copy(loader)
    if hasattr(own, "set_iteration"):
        own.set_iteration(0)
    return own


def own_batches(loader: Any, seed: int) -> Callable[[], Iterator[Any]]:
    """What returns a fresh iterator of training batches, apart from the training iterator.

    Neither the order of the training data nor any random state outside changes, and the batches are
    the same at every call.

    Args:
        loader: the training loader.
        seed: of the random augmentations.
    """

    def batches() -> Iterator[Any]:
        stream = RandomStream(seed % 2**32)
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
