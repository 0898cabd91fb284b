"""Training batches for RePr's own use, which leave the run that they serve untouched."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from detectron2.data.common import (
    AspectRatioGroupedDataset,
    MapDataset,
    ToIterableDataset,
    _MapIterableDataset,
)
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from repr_det.engine.randomness import RandomStream

_KNOWN_SAMPLERS = ("torch.utils.data.", "detectron2.data.")
"""Where samplers come from whose copy shares nothing with them."""


class _UnknownLoaderError(Exception):
    """A second iterator of this loader might take batches from the training iterator."""


def _loader_of_its_own(loader: Any) -> Any:
    """A loader over the same data, from its beginning, that shares no state with the given one.

    Raises:
        _UnknownLoaderError: the loader, its dataset or its sampler is of a kind not listed here.
    """
    if hasattr(type(loader), "reopened"):  # a loader of this package
        return loader.reopened()
    if type(loader) in (list, tuple, range):
        return loader
    if type(loader) is AspectRatioGroupedDataset:
        return AspectRatioGroupedDataset(_loader_of_its_own(loader.dataset), loader.batch_size)
    if type(loader) is _MapIterableDataset:
        return _MapIterableDataset(_loader_of_its_own(loader._dataset), loader._map_func)
    if type(loader) is ToIterableDataset:
        data, sampler = _dataset_of_its_own(loader.dataset), _sampler_of_its_own(loader.sampler)
        return ToIterableDataset(data, sampler, loader.shard_sampler, loader.shard_chunk_size)
    if type(loader) is DataLoader:
        return _data_loader_of_its_own(loader)
    raise _UnknownLoaderError(type(loader).__name__)


def _data_loader_of_its_own(loader: DataLoader) -> DataLoader:
    """A new one in this process: to iterate over the old one would reset persistent workers."""
    if isinstance(loader.dataset, IterableDataset):
        data = _loader_of_its_own(loader.dataset)
        order: dict[str, Any] = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    else:
        data = _dataset_of_its_own(loader.dataset)
        if loader.batch_size is None and loader.batch_sampler is None:
            order = {"batch_size": None, "sampler": _sampler_of_its_own(loader.sampler)}
        else:
            order = {"batch_sampler": _sampler_of_its_own(loader.batch_sampler)}
    return DataLoader(data, collate_fn=loader.collate_fn, **order)


def _dataset_of_its_own(dataset: Any) -> Any:
    """The same map-style dataset; Detectron2's mapper remembers which images it could read."""
    if type(dataset) is not MapDataset:
        return dataset
    return MapDataset(_dataset_of_its_own(dataset._dataset), dataset._map_func)


def _sampler_of_its_own(sampler: Any) -> Any:
    """A copy of a sampler that reads the same dataset.

    Raises:
        _UnknownLoaderError: it may hold an iterator that is running, or cannot be copied.
    """
    memo: dict[int, Any] = {}
    waiting = [sampler]
    while waiting:
        one = waiting.pop()
        if hasattr(one, "__next__") or not (
            type(one).__module__.startswith(_KNOWN_SAMPLERS)
            or type(one) in (list, tuple, range)
            or inspect.isgeneratorfunction(type(one).__iter__)
        ):
            raise _UnknownLoaderError(type(one).__name__)
        for key, value in getattr(one, "__dict__", {}).items():
            if key in ("dataset", "data_source") or isinstance(value, Dataset):
                memo[id(value)] = value  # in the memo, so deepcopy shares it instead of copying it
            elif isinstance(value, Sampler):
                waiting.append(value)
    try:
        return copy.deepcopy(sampler, memo)
    except Exception as error:  # a generator, a lock, an open file
        raise _UnknownLoaderError(type(sampler).__name__) from error


def own_batches(loader: Any, seed: int) -> Callable[[], Iterator[Any]] | None:
    """What returns a fresh iterator of training batches, apart from the training iterator.

    Neither the order of the training data nor any random state outside changes, and the batches are
    the same at every call.

    Args:
        loader: the training loader.
        seed: of the random augmentations.

    Returns:
        None where there is no loader, or where it is not known to bear a second iterator: a loader
        of a class of one's own, an iterator, a dataset that is a stream, a sampler that is running.
    """
    try:
        _loader_of_its_own(loader)
    except _UnknownLoaderError:
        return None

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
