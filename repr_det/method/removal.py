"""Decides which pruned filters can be removed physically, so that a smaller network is left.

A filter can be removed if everything that uses its channel works the same with one channel fewer.
Its norm and the layers that read it lose their part of it. Other operations must treat channels one
by one. Where channels are combined (a sum, a shared layer, a concatenated batch), they are removed
together or not at all. Tracing of real runs shows all of this (:mod:`repr_det.method.tracing`).
Nothing depends on names or types of architectures.

Torch-Pruning (1.6.1) is not used, for two reasons. It treats operations that it does not know as
elementwise, so a flip of the channels silently pairs the wrong ones. And it replaces Parameters, so
the optimizer would keep the old ones and nothing could come back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from repr_det.method.graph import ChannelGraph
from repr_det.method.modules import norm_channels


class Removal(NamedTuple):
    """What is removed, True where it is.

    Attributes:
        filters: filters by conv or linear layer, bool of shape (J,).
        inputs: input channels by conv or linear layer, bool of shape (c_in,).
        norms: channels by norm, bool of shape (channels,).
    """

    filters: dict[str, Tensor]
    inputs: dict[str, Tensor]
    norms: dict[str, Tensor]


class Removable:
    """The filters of a network, in groups that are removed together or not at all.

    Args:
        graph: how channels go through the network.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self._graph = graph
        self._groups = graph.groups
        # The group of each input channel by reader; -1 where it is unknown. All filters of one
        # channel are in one group.
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
        """The pruned filters to remove.

        Args:
            pruned: bool of shape (J,) by layer name.
            multiple: a layer that loses filters keeps a multiple of this number of filters.

        Returns:
            Layers and norms that lose something. Each group of a grouped conv loses the same number
            of filters and inputs. Where that or ``multiple`` keeps some, the last ones stay.
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
        """Which groups are wholly pruned and not fixed. One more entry is for index -1: False."""
        count = torch.zeros_like(self._size)
        for name, mask in pruned.items():
            gone = self._groups[name][mask.cpu()]
            count.index_add_(0, gone, torch.ones_like(gone))
        return torch.cat([(count == self._size) & ~self._fixed, torch.tensor([False])])

    def _keep_some(self, going: Tensor, multiple: int) -> bool:
        """Keep what grouped convs and ``multiple`` need, in place. Returns whether it kept any."""
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
    """Keep members in place until every row loses as many as the row that loses fewest."""
    gone = going[members]
    excess = gone & (gone.cumsum(1) > gone.sum(1).min())
    going[members[excess]] = False


def _some(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: mask for name, mask in masks.items() if mask.any()}
