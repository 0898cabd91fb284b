"""Training batches for RePr's own use, which leave the run that they serve untouched."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from detectron2.data.common import AspectRatioGroupedDataset, _MapIterableDataset
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from repr_det.engine.randomness import RandomStream

_BUCKETS = (list, deque, set)


def _loader_of_its_own(loader: Any) -> Any:
    """A loader over the same data, from its beginning, that shares no state with the given one."""
    if isinstance(loader, AspectRatioGroupedDataset):
        own = copy.copy(loader)
        own.dataset = _loader_of_its_own(loader.dataset)
        own._buckets = [[] for _ in loader._buckets]
        return own
    if isinstance(loader, _MapIterableDataset):
        return type(loader)(_loader_of_its_own(loader._dataset), loader._map_func)
    if isinstance(loader, DataLoader):
        if isinstance(loader.dataset, IterableDataset):
            order = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        elif loader.batch_size is None:
            order = {"batch_size": None, "sampler": _sampler_of_its_own(loader.sampler)}
        else:
            order = {"batch_sampler": _sampler_of_its_own(loader.batch_sampler)}
        return DataLoader(loader.dataset, collate_fn=loader.collate_fn, **order)
    own = copy.copy(loader)
    for key, value in vars(own).items() if hasattr(own, "__dict__") else ():
        if isinstance(value, (dict, *_BUCKETS)):  # what it has gathered for its next batches
            vars(own)[key] = _container_of_its_own(value)
    if hasattr(own, "set_iteration"):
        own.set_iteration(0)
    return own


def _container_of_its_own(container: Any) -> Any:
    """A copy, also of the buckets in it, that holds the same things."""
    own = copy.copy(container)
    if not isinstance(own, set):  # whose entries cannot be buckets
        for place, value in list(own.items() if isinstance(own, dict) else enumerate(own)):
            if isinstance(value, _BUCKETS):
                own[place] = copy.copy(value)
    return own


def _sampler_of_its_own(sampler: Any) -> Any:
    """A copy of a sampler that reads the same dataset."""
    memo: dict[int, Any] = {}
    waiting = [sampler]
    while waiting:
        for key, value in getattr(waiting.pop(), "__dict__", {}).items():
            if key in ("dataset", "data_source") or isinstance(value, Dataset):
                memo[id(value)] = value  # taken by deepcopy for a copy that is made already
            elif isinstance(value, Sampler):
                waiting.append(value)
    return copy.deepcopy(sampler, memo)


def can_be_opened_again(loader: Any) -> bool:
    """Whether there is a loader, and a second iterator of it takes no batches from the first."""
    return loader is not None and not hasattr(loader, "__next__")


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
