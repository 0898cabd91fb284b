"""Statistics of returned channels in front of norms whose statistics never train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from repr_det.method.layers import NormLink
from repr_det.method.modules import eager, unchanged
from repr_det.method.ranks import Group, sum_over_ranks


class _Sums:
    """Sums over some channels of a norm's input, on this rank.

    Every call of the norm sets the running statistics of these channels before they are applied,
    so later layers already see the corrected channels.
    """

    def __init__(self, link: NormLink, channels: Tensor) -> None:
        self.link, self.channels = link, channels
        mean, _ = next(link.running_statistics())
        # Sum, sum of squares, and number of values.
        self.sums = torch.zeros(3, len(channels), dtype=torch.float64, device=mean.device)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = (args or tuple(kwargs.values()))[0].detach()
        channels = self.channels.to(x.device)
        x = x.index_select(1, channels).double().transpose(0, 1).flatten(1)
        counts = torch.full_like(channels, x.shape[1], dtype=torch.float64)
        self.sums += torch.stack([x.sum(dim=1), x.square().sum(dim=1), counts])
        self.set(self.sums)

    def set(self, sums: Tensor) -> None:
        """Set the running statistics; they stay as they are where nothing was seen."""
        if not len(self.channels) or not sums[2, 0]:  # a box head without boxes
            return
        mean, square = sums[:2] / sums[2]
        for running_mean, running_var in self.link.running_statistics():
            channels = self.channels.to(running_mean.device)
            running_mean[channels] = mean.to(running_mean.dtype)
            running_var[channels] = (square - mean.square()).clamp(min=0).to(running_var.dtype)


@contextmanager
def _measuring(found: Iterable[_Sums]) -> Iterator[None]:
    handles = [sums.link.module.register_forward_pre_hook(sums, with_kwargs=True) for sums in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def calibrate(
    model: nn.Module,
    links: Iterable[tuple[NormLink, Tensor]],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    group: Group = None,
) -> None:
    """Set running mean and variance of some channels to what real batches show.

    Each rank runs its own batches, and a norm that comes after another one sees what the other one
    makes of the statistics of this rank so far. The sums of all ranks are added once, after all
    batches, so ranks may have other numbers of batches and may use other norms for them. Channels
    that no rank saw keep their statistics.

    Args:
        model: run by ``loss(model, batch)``; all else about it stays as it was.
        links: norms, each with the channels to set (int64); the same ones on every rank.
        batches: the batches to measure.
        loss: runs the model on a batch.
        group: the ranks.
    """
    found = [_Sums(link, channels) for link, channels in links]
    with unchanged(model), eager(), _measuring(found):
        for batch in batches:
            loss(model, batch)
    # `unchanged` has put the old buffers back, the measured channels with them.
    total = sum_over_ranks({i: one.sums for i, one in enumerate(found)}, group)
    for i, one in enumerate(found):
        one.set(total[i])
