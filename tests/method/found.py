"""What RePr finds in a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repr_det import RePr, RePrSchedule
from repr_det.method.graph import ChannelGraph
from repr_det.method.tracing import trace
from tests.method.nets import loss


def images(brightness: float = 0.0, count: int = 2, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, size, size, generator=generator) + brightness
    return x, torch.arange(count) % 2


def method_of(model, data=None, **arguments):
    trainer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    given = {} if data is None else {"batches": lambda: iter([data]), "loss": loss}
    return RePr(model, trainer, RePrSchedule(1, 9, 1), 0.3, **given, **arguments)


def names_of(model, *data, **arguments):
    return [layer.name for layer in method_of(model, *data, **arguments).layers]


def dead(model, **pruned):
    """:func:`dead_channels` of a model that is followed on an example."""
    return dead_channels(trace(model), pruned)


def dead_channels(graph: ChannelGraph, pruned: dict[str, list[int]]) -> dict[str, list[int]]:
    """Which input channels of which readers are zero while some filters are pruned."""
    masks = {}
    for name, filters in pruned.items():
        masks[name] = torch.zeros(graph.convs[name].out_channels, dtype=torch.bool)
        masks[name][filters] = True
    found = {r.name: r.dead(masks).nonzero().flatten().tolist() for r in graph.readers.values()}
    return {name: channels for name, channels in found.items() if channels}


class Between(nn.Module):
    """A conv, an operation and a conv that reads the result."""

    def __init__(self, operation) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.operation(self.a(x)))


class Pooled(nn.Module):
    """A linear layer that reads the mean of each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))
