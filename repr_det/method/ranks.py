"""Communication between the processes of one run.

These are the processes of the process group of the model's DistributedDataParallel, or all
processes where it has none. All ranks must make the same calls in the same order. So no function
here may be called inside a model's forward pass, or a number of times that depends on the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Group = Any
"""A process group of ``torch.distributed``; None is the default one."""


def group_of(model: nn.Module) -> Group:
    """The process group that a model is trained in; it may be inside of other wrappers."""
    wrapped = (m for m in model.modules() if isinstance(m, DistributedDataParallel))
    return next((m.process_group for m in wrapped), None)


def distributed(group: Group = None) -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def rank_in(group: Group = None) -> int:
    """The number of this process in its group, from 0."""
    return dist.get_rank(group) if distributed(group) else 0


def mean_over_ranks(tensor: Tensor, group: Group = None) -> Tensor:
    """The mean of a tensor over all ranks, in place."""
    if distributed(group):
        dist.all_reduce(tensor, group=group)
        tensor /= dist.get_world_size(group)
    return tensor


def sum_over_ranks(tensors: Mapping[Any, Tensor], group: Group = None) -> dict[Any, Tensor]:
    """Sums of float64 tensors over all ranks, by one reduction.

    Args:
        tensors: with the same shapes in the same order on every rank.
        group: the ranks.
    """
    if not (tensors and distributed(group)):
        return dict(tensors)
    device = next(iter(tensors.values())).device
    flat = torch.cat([tensor.to(device).flatten() for tensor in tensors.values()])
    dist.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {
        name: part.view(tensor.shape).to(tensor.device)
        for part, (name, tensor) in zip(parts, tensors.items(), strict=True)
    }


def from_first_rank(tensors: dict[str, Tensor], group: Group = None) -> dict[str, Tensor]:
    """The first rank's values of some tensors, on all ranks."""
    if not distributed(group):
        return tensors
    # A broadcast ignores strides, which may differ between ranks.
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        dist.broadcast(tensor, _first(group), group=group)
    return tensors


def from_first_rank_in_place(tensors: Iterable[Tensor], group: Group = None) -> None:
    """Set tensors to the first rank's values."""
    for tensor in tensors if distributed(group) else ():
        dist.broadcast(tensor, _first(group), group=group)


def object_of_first_rank(found: Any, group: Group = None) -> Any:
    """The first rank's object, pickled, on all ranks."""
    if not distributed(group):
        return found
    objects = [found]
    dist.broadcast_object_list(objects, _first(group), group=group)
    return objects[0]


def objects_of_all_ranks(found: Any, group: Group = None) -> list[Any]:
    """Each rank's object, pickled, on all ranks."""
    if not distributed(group):
        return [found]
    objects = [None] * dist.get_world_size(group)
    dist.all_gather_object(objects, found, group=group)
    return objects


def _first(group: Group) -> int:
    """The global rank of a group's first process."""
    return 0 if group is None else dist.get_global_rank(group, 0)
