"""What the processes of one run agree on."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, in place."""
    if distributed():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def from_first_rank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first rank's values of some tensors, on all ranks."""
    if not distributed():
        return tensors
    # What is broadcast is the memory, whatever its strides are on each rank.
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        dist.broadcast(tensor, 0)
    return tensors
