"""Measures the statistics of returned channels where a norm's statistics do not train."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from repr_det.method.layers import NormLink
from repr_det.method.modules import eager, unchanged
from repr_det.method.ranks import Group, sum_over_ranks


class _Sums:
    """Sums over some channels of a norm's input, on this rank.

    Each call of the norm first sets the running statistics of these channels, so later layers
    already get the corrected channels.
    """

    def __init__(self, link: NormLink, channels: Tensor) -> None:
        self.link, self.channels = link, channels
        mean, _ = next(link.running_statistics())
        # Sum, sum of squares, and number of values.
        self.sums = torch.zeros(3, len(channels), dtype=torch.float64, device=mean.device)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = (args or tuple(kwargs.values()))[0].detach()
        channels = self.channels.to(x.device)
        dim = self.link.dim
        x = x.index_select(dim, channels).double().transpose(0, dim).flatten(1)
        counts = torch.full_like(channels, x.shape[1], dtype=torch.float64)
        self.sums += torch.stack([x.sum(dim=1), x.square().sum(dim=1), counts])
        self.set(self.sums)

    def set(self, sums: Tensor) -> None:
        """Set the running statistics; they stay the same where nothing was measured."""
        if not len(self.channels) or not sums[2, 0]:  # a box head without boxes
            return
        mean, square = sums[:2] / sums[2]
        for running_mean, running_var in self.link.running_statistics():
            channels = self.channels.to(running_mean.device)
            running_mean[channels] = mean.to(running_mean.dtype)
            running_var[channels] = (square - mean.square()).clamp(min=0).to(running_var.dtype)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    links: Iterable[tuple[NormLink, Tensor]],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    group: Group = None,
) -> None:
    """Set the running mean and variance of some channels to those of real batches.

    Each rank runs its own batches. While they run, a norm uses the statistics of its own rank so
    far. The sums of all ranks are added once, after all batches, so ranks may differ in their
    number of batches and in which norms run. Channels that no rank measured keep their statistics.

    Args:
        model: run by ``loss(model, batch)``; everything else of it is unchanged.
        links: norms, each with the channels to set (int64); the same ones on every rank.
        batches: the batches to measure.
        loss: runs the model on a batch.
        group: the ranks.
    """
    found = [_Sums(link, channels) for link, channels in links]
    with unchanged(model), eager(), ExitStack() as hooks:
        for one in found:
            module = one.link.module
            hooks.enter_context(module.register_forward_pre_hook(one, with_kwargs=True))
        for batch in batches:
            loss(model, batch)
    # `unchanged` has restored all buffers, so the statistics are set again.
    total = sum_over_ranks({i: one.sums for i, one in enumerate(found)}, group)
    for i, one in enumerate(found):
        one.set(total[i])
