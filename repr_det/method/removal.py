"""Which pruned filters can be taken out physically, so that what is left is a smaller network.

A filter can go if everything that sees its channel works alike with one channel fewer: its norm and
the layers that read it, which lose their part of it, and operations that treat channels one by one.
Where channels are brought together (a sum, a shared layer, a batch of several inputs), they go
together or not at all. All of this was seen by following the channels through real runs
(:mod:`repr_det.method.tracing`); nothing depends on names or types of architectures.

Torch-Pruning (1.6.1) was not taken for this. It treats operations that it does not know as entry by
entry, so a flip of the channels silently pairs the wrong ones. And it replaces parameters by new
ones, so nothing could come back to the optimizer that trains them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from repr_det.method.graph import ChannelGraph
from repr_det.method.modules import norm_channels


class Removal(NamedTuple):
    """What goes.

    Attributes:
        filters: by conv or linear layer, bool of shape (J,).
        inputs: by conv or linear layer, its input channels, bool of shape (c_in,).
        norms: by norm, bool of shape (channels,).
    """

    filters: dict[str, Tensor]
    inputs: dict[str, Tensor]
    norms: dict[str, Tensor]


class Removable:
    """The filters of a network in groups that can only go together.

    Args:
        graph: how channels go through the network.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self._graph = graph
        self._groups = graph.groups
        # By reader, the group of each input channel; -1 where it is not known. Filters of one
        # channel are in one group already, so any stands for all.
        self._inputs: dict[str, Tensor] = {}
        for name, reader in graph.readers.items():
            self._inputs[name] = torch.full(reader.unknown.shape, -1, dtype=torch.int32)
            for conv, (channels, filters) in reader.filters.items():
                self._inputs[name][channels] = graph.groups[conv][filters]
        self._widths = {
            link.name: norm_channels(link.module) or 0
            for links in graph.norms.values()
            for link in links
        }
        count = max((int(numbers.max()) + 1 for numbers in graph.groups.values()), default=0)
        self._size = torch.zeros(count, dtype=torch.int32)
        self._fixed = torch.zeros(count, dtype=torch.bool)
        for name, numbers in graph.groups.items():
            self._size.index_add_(0, numbers, torch.ones_like(numbers))
            self._fixed[numbers[graph.fixed[name]]] = True

    def choose(self, pruned: dict[str, Tensor], multiple: int = 1) -> Removal:
        """The pruned filters that go.

        Args:
            pruned: bool of shape (J,) by layer name.
            multiple: number of filters of a layer that loses some becomes a multiple of this.

        Returns:
            only layers that lose something. Of a grouped conv every group loses equally much, of
            filters and of inputs; the last ones stay where that or ``multiple`` keeps some.
        """
        going = self._going(pruned)
        while self._keep_some(going, multiple):
            pass
        filters = {name: going[members] for name, members in self._groups.items()}
        inputs = {name: going[members] for name, members in self._inputs.items()}
        norms: dict[str, Tensor] = {}
        for name, links in self._graph.norms.items():
            for link in links:
                channels = link.channels_of(filters[name])
                if len(channels):
                    none = torch.zeros(self._widths[link.name], dtype=torch.bool)
                    norms.setdefault(link.name, none)[channels] = True
        return Removal(_some(filters), _some(inputs), norms)

    def _going(self, pruned: dict[str, Tensor]) -> Tensor:
        """Which groups are pruned whole and may go; one more entry for what index -1 stands for."""
        count = torch.zeros_like(self._size)
        for name, mask in pruned.items():
            gone = self._groups[name][mask.cpu()]
            count.index_add_(0, gone, torch.ones_like(gone))
        return torch.cat([(count == self._size) & ~self._fixed, torch.tensor([False])])

    def _keep_some(self, going: Tensor, multiple: int) -> bool:
        """Keep what would break up a grouped conv or a multiple, in place; whether any was."""
        before = int(going.sum())
        for name, layer in self._graph.layers.items():
            members, groups = self._groups[name], getattr(layer, "groups", 1)
            if groups > 1:
                _equalize(going, members.reshape(groups, -1))
                if name in self._inputs:
                    _equalize(going, self._inputs[name].reshape(groups, -1))
            gone = going[members].nonzero().flatten()
            if len(gone):
                odd = (len(members) - len(gone)) % multiple
                spare = min(multiple - odd, len(gone)) if odd else 0
                going[members[gone[len(gone) - spare :]]] = False
        return int(going.sum()) < before


def _equalize(going: Tensor, members: Tensor) -> None:
    """Let as many members of each row go as go of the row that loses least, in place."""
    gone = going[members]
    excess = gone & (gone.cumsum(1) > gone.sum(1).min())
    going[members[excess]] = False


def _some(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: mask for name, mask in masks.items() if mask.any()}
