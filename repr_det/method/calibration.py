"""Statistics of returned channels in front of norms whose statistics never train."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from repr_det.method.layers import NormLink
from repr_det.method.modules import eager, unchanged


@contextmanager
def _measuring(
    links: Iterable[tuple[NormLink, Tensor]], average: Callable[[Tensor], Tensor]
) -> Any:
    """While inside, every run sets the running statistics of the given channels on its way.

    A norm is corrected before it is applied, so what lies deeper already sees the corrected
    channel; further batches average into the same statistics.
    """
    handles = []
    for link, channels in links:
        handles.append(link.module.register_forward_pre_hook(_Measure(link, channels, average)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Measure:
    """Pools mean and variance of some channels of a norm's input over calls and processes."""

    def __init__(
        self, link: NormLink, channels: Tensor, average: Callable[[Tensor], Tensor]
    ) -> None:
        self._link = link
        self._channels = channels
        self._average = average
        self._sums: Tensor | float = 0.0

    def __call__(self, module: nn.Module, args: Any) -> None:
        channels = self._channels.to(args[0].device)
        x = args[0].detach().index_select(1, channels).double().transpose(0, 1).flatten(1)
        counts = torch.full_like(channels, x.shape[1], dtype=torch.float64)
        sums = torch.stack([x.sum(dim=1), x.square().sum(dim=1), counts])
        self._sums = self._sums + self._average(sums)
        # A call may see nothing: a box head without boxes.
        mean, square = self._sums[:2] / self._sums[2].clamp(min=1)
        for running_mean, running_var in self._link.running_statistics():
            running_mean[channels] = mean.to(running_mean.dtype)
            running_var[channels] = (square - mean.square()).clamp(min=0).to(running_var.dtype)


def calibrate(
    model: nn.Module,
    links: Iterable[tuple[NormLink, Tensor]],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    average: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> None:
    """Set running mean and variance of some channels to what real batches show.

    Args:
        model: run by ``loss(model, batch)``; all else about it stays as it was.
        links: norms, each with the channels to set (int64).
        batches: the batches to measure.
        loss: runs the model on a batch.
        average: averages a tensor over processes.
    """
    links = list(links)
    with unchanged(model), torch.no_grad(), eager(), _measuring(links, average):
        for batch in batches:
            loss(model, batch)
        measured = [
            [(mean[c].clone(), var[c].clone()) for mean, var in link.running_statistics()]
            for link, c in links
        ]
    # `unchanged` has put the old buffers back, the measured channels with them.
    with torch.no_grad():
        for (link, c), values in zip(links, measured, strict=True):
            for (mean, var), (new_mean, new_var) in zip(
                link.running_statistics(), values, strict=True
            ):
                mean[c], var[c] = new_mean, new_var
