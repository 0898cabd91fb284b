"""What following channels through a model showed so far."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch

from repr_det.method.channels import Channels, Filter, Tag, filters_of


@dataclass
class Found:
    """What runs showed so far, as names and numbers.

    Attributes:
        ran: layers whose forward ran.
        used: parameters that an operation outside of norms and linear layers used.
        inputs: by conv and linear layer, the sources of its input channels, merged over calls.
        lost: by layer with a filter that could not be followed everywhere, where it was lost.
        links: by (layer, norm, channel of the norm), the filter that the channel belongs to.
        link_dims: by (layer, norm), the dimension that counts the norm's channels.
        mixed: channels of norms that held something other than one filter.
        read: layers whose output another layer with weights reads.
        stems: layers with no layer with weights before them.
        gating: filters whose zero becomes a constant that multiplies other channels.
        irregular: layers that do not simply multiply their input by their own weight. The weight
            is computed from others, is used outside the layer, or multiplies something other than
            the input. Also norms that do not keep zeros.
        tied: pairs of filters that are removed together or not at all.
        fixed: filters that must not be removed.
        shapes: by conv, the shape of its input.
        doubtful: convs whose output may not be zero where their filter is zero.
        scaled: layers whose filters meet a parameter outside of layers, such as a scale.
        unsuitable: layers whose filters go into an operation that is infinite at zero, or into a
            norm that is no module.
        borrowed: layers that run with other parameters than theirs, or share memory with others.
    """

    ran: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    inputs: dict[str, Channels] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    links: dict[tuple[str, str, int], int] = field(default_factory=dict)
    link_dims: dict[tuple[str, str], int] = field(default_factory=dict)
    mixed: set[tuple[str, int]] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    stems: set[str] = field(default_factory=set)
    gating: set[Filter] = field(default_factory=set)
    irregular: set[str] = field(default_factory=set)
    tied: set[tuple[Filter, Filter]] = field(default_factory=set)
    fixed: set[Filter] = field(default_factory=set)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    doubtful: set[str] = field(default_factory=set)
    scaled: set[str] = field(default_factory=set)
    unsuitable: set[str] = field(default_factory=set)
    borrowed: set[str] = field(default_factory=set)

    def copy(self) -> Found:
        """A copy that later notes do not change."""
        return Found(**{key: copy.copy(value) for key, value in vars(self).items()})

    def pin(self, *tags: Tag | None) -> None:
        """Forbid that the channels of these tags are removed."""
        for tag in tags:
            # The filters of one channel are tied already, so any of them stands for all.
            self.fixed.update(next(iter(s)) for s in (tag.sources if tag else ()) if s)

    def lose(self, what: str, *tags: Tag | None) -> None:
        """Pin these channels, and record that they could not be followed into ``what``."""
        self.pin(*tags)
        for tag in tags:
            for name, _ in filters_of(tag.sources if tag else ()):
                self.lost.setdefault(name, what)

    def tie(self, a: Channels, b: Channels) -> None:
        """Remove channels ``a[i]`` and ``b[i]`` together or not at all."""
        for x, y in zip(a, b, strict=True):
            if x and y and x != y:
                self.tied.add((next(iter(x)), next(iter(y))))
            elif x != y and (one := x or y):
                self.fixed.add(next(iter(one)))
