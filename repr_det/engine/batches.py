"""Training batches for RePr's own use, which do not affect the batches of the run."""

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
"""Modules with samplers of which a copy shares no state with the original."""


class _UnknownLoaderError(Exception):
    """A second iterator of this loader might take batches from the training iterator."""


def _loader_of_its_own(loader: Any) -> Any:
    """A loader over the same data, from the beginning, that shares no state with the given one.

    Raises:
        _UnknownLoaderError: the loader, its dataset or its sampler is not of a kind listed here.
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
    """A new loader without workers. To iterate over the old one would reset its workers."""
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
    """The same map-style dataset. Detectron2's MapDataset has state: images that it could read."""
    if type(dataset) is not MapDataset:
        return dataset
    return MapDataset(_dataset_of_its_own(dataset._dataset), dataset._map_func)


def _sampler_of_its_own(sampler: Any) -> Any:
    """A copy of a sampler that reads the same dataset.

    Raises:
        _UnknownLoaderError: it may hold a running iterator, or cannot be copied.
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
    """A function that returns a new iterator of training batches.

    It changes neither the order of the training data nor any random state outside. The batches are
    the same at every call.

    Args:
        loader: the training loader.
        seed: of the random augmentations.

    Returns:
        The function. None without a loader, or where a second iterator might disturb the first: a
        loader of an unknown class, an iterator, a stream, a sampler that is running.
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

    Scalars that the model writes meanwhile are discarded.
    """
    with EventStorage():
        losses = model(batch)
    return losses if isinstance(losses, Tensor) else sum(losses.values())
