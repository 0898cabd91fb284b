"""How channels go through a model: the result of tracing, in a form that can be saved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from repr_det.errors import UserError
from repr_det.method.channels import Channels, Filter
from repr_det.method.layers import FilterLayer, NormLink
from repr_det.method.modules import named_modules, num_filters


@dataclass(eq=False)
class Reader:
    """A conv or linear layer and the filters that its input channels are computed from.

    Attributes:
        name: dotted name.
        module: the layer.
        unknown: input channels that are never known to be zero: bool of shape (c_in,).
        filters: by layer that is read, input channels and the filter that each is computed from:
            two int32 tensors of shape (n,). A channel that occurs several times is zero while all
            of its filters are pruned.
    """

    name: str
    module: nn.Module
    unknown: Tensor
    filters: dict[str, tuple[Tensor, Tensor]]

    def dead(self, pruned: dict[str, Tensor]) -> Tensor:
        """Which input channels are zero while some filters are pruned.

        Args:
            pruned: bool of shape (J,) by layer name; layers left out are not pruned.

        Returns:
            bool of shape (c_in,).
        """
        alive = self.unknown.clone()
        for name, (channels, filters) in self.filters.items():
            if name in pruned:
                channels = channels[~pruned[name].cpu()[filters]]
            alive[channels] = True
        return ~alive


def reader_of(name: str, module: nn.Module, sources: Channels) -> Reader:
    """The reader whose input channels have the given sources, one for each channel."""
    pairs: dict[str, list[tuple[int, int]]] = {}
    for channel, filters in enumerate(sources):
        for conv, index in sorted(filters or ()):
            pairs.setdefault(conv, []).append((channel, index))
    indices = {
        conv: torch.tensor(some, dtype=torch.int32).T.contiguous() for conv, some in pairs.items()
    }
    # Channels that are always zero (no sources) are never treated as pruned.
    unknown = torch.tensor([not filters for filters in sources], dtype=torch.bool)
    return Reader(name, module, unknown, {c: (both[0], both[1]) for c, both in indices.items()})


@dataclass
class ChannelGraph:
    """What one or several runs of a model showed.

    Attributes:
        convs: every conv that ran, by dotted name.
        linears: every linear layer that ran and multiplies its input by its own weight.
        visible: by linear layer whose units are not hidden, why: the operation after which a unit
            is not known to be zero, or what else uses it.
        norms: by layer, the norm channels that each belong to one of its filters.
        readers: every conv and linear layer that ran, by dotted name.
        stems: layers that read the image: no layer with weights is before them.
        heads: prediction layers: convs with no layer with weights between them and the output.
        gates: layers with a filter that no layer reads, and whose zero becomes a constant that
            multiplies other channels: squeeze-and-excitation, softmax over branches.
        unsuitable: layers whose filters cannot be held. Their norm is used elsewhere, or their
            output may not be zero where all that belongs to a filter is zero, or goes into an
            operation that is infinite at zero, or into a norm that is no module.
        groups: by layer, the group of each filter (int32 of shape (J,)). Filters of one group are
            removed together or not at all: a sum, a shared layer or a concatenated batch combines
            their channels.
        fixed: by layer, filters that must not be removed (bool of shape (J,)). Something uses their
            channels that may not work the same with fewer of them.
        partly: layers whose filters meet more than the columns of layers, and what they meet. There
            may be weights that read only zeros and are not zero themselves.
        not_run: parameters and norms that no run used. What they would read is unknown.
        example: runs the model on the example input on which it was followed, if there was one.
    """

    convs: dict[str, nn.Module] = field(default_factory=dict)
    linears: dict[str, nn.Module] = field(default_factory=dict)
    visible: dict[str, str] = field(default_factory=dict)
    norms: dict[str, list[NormLink]] = field(default_factory=dict)
    readers: dict[str, Reader] = field(default_factory=dict)
    stems: set[str] = field(default_factory=set)
    heads: set[str] = field(default_factory=set)
    gates: set[str] = field(default_factory=set)
    unsuitable: set[str] = field(default_factory=set)
    groups: dict[str, Tensor] = field(default_factory=dict)
    fixed: dict[str, Tensor] = field(default_factory=dict)
    partly: dict[str, str] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)
    example: Callable[[], Any] | None = None

    @property
    def layers(self) -> dict[str, nn.Module]:
        """All convs and linear layers that have filters."""
        return {**self.convs, **self.linears}

    def state_dict(self) -> dict[str, Any]:
        """Everything but modules and the example, as names, numbers and tensors."""
        return {
            "convs": list(self.convs),
            "linears": list(self.linears),
            "visible": dict(self.visible),
            "norms": {
                conv: [
                    {"name": n.name, "filters": n.filters, "channels": n.channels, "dim": n.dim}
                    for n in links
                ]
                for conv, links in self.norms.items()
            },
            "readers": {
                name: {"unknown": r.unknown, "filters": {c: list(p) for c, p in r.filters.items()}}
                for name, r in self.readers.items()
            },
            "stems": sorted(self.stems),
            "heads": sorted(self.heads),
            "gates": sorted(self.gates),
            "unsuitable": sorted(self.unsuitable),
            "groups": dict(self.groups),
            "fixed": dict(self.fixed),
            "partly": dict(self.partly),
            "not_run": list(self.not_run),
        }

    @classmethod
    def from_state(
        cls, state: dict[str, Any], model: nn.Module, example: Callable[[], Any] | None = None
    ) -> ChannelGraph:
        """The graph that :meth:`state_dict` describes, with the modules of a model.

        Raises:
            KeyError: the model lacks one of the modules.
        """
        modules = dict(named_modules(model))

        def on_cpu(values: dict[str, Any]) -> dict[str, Any]:
            return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in values.items()}

        return cls(
            convs={name: modules[name] for name in state["convs"]},
            # Older checkpoints do not mention linear layers.
            linears={name: modules[name] for name in state.get("linears", ())},
            visible=dict(state.get("visible", {})),
            norms={
                conv: [NormLink(module=modules[link["name"]], **on_cpu(link)) for link in links]
                for conv, links in state["norms"].items()
            },
            readers={
                name: Reader(
                    name,
                    modules[name],
                    reader["unknown"].cpu(),
                    {c: tuple(i.cpu() for i in pair) for c, pair in reader["filters"].items()},
                )
                for name, reader in state["readers"].items()
            },
            stems=set(state["stems"]),
            heads=set(state["heads"]),
            gates=set(state["gates"]),
            unsuitable=set(state["unsuitable"]),
            groups=on_cpu(state["groups"]),
            fixed=on_cpu(state["fixed"]),
            partly=dict(state.get("partly", {})),  # older checkpoints lack it
            not_run=list(state["not_run"]),
            example=example,
        )


def in_copy(
    copy: nn.Module, layers: Sequence[FilterLayer], readers: Sequence[Reader]
) -> tuple[list[FilterLayer], list[Reader]]:
    """The same layers and readers in a copy of the model.

    Raises:
        UserError: the copy lacks a layer, or has one of another shape.
    """
    modules = dict(named_modules(copy))
    if missing := {layer.name for layer in layers} - set(modules):
        raise UserError(
            f"RePr: a copy of the model has no layer {min(missing)}. Build copies as the model is "
            f"built."
        )
    both: list[FilterLayer | Reader] = [*layers, *readers]
    for layer in both:
        weights: list[Any] = [layer.module.weight, modules[layer.name].weight]
        mine, theirs = (tuple(weight.shape) for weight in weights)
        if mine != theirs:
            raise UserError(
                f"RePr: the weight of {layer.name} is {theirs} in a copy of the model and "
                f"{mine} in the model. Build copies as the model is built."
            )
    found = []
    for layer in layers:
        norms = tuple(replace(link, module=modules[link.name]) for link in layer.norms)
        found.append(replace(layer, module=modules[layer.name], norms=norms))
    return found, [replace(r, module=modules[r.name]) for r in readers]


def groups_of(tied: Iterable[tuple[Filter, Filter]], widths: dict[str, int]) -> dict[str, Tensor]:
    """The group of each filter, by layer: int32 of shape (J,). Tied filters are in one group.

    Args:
        tied: pairs of filters.
        widths: number of filters by layer.
    """
    parents: dict[Filter, Filter] = {}

    def root(one: Filter) -> Filter:
        path = []
        while one in parents:
            path.append(one)
            one = parents[one]
        for passed in path:
            parents[passed] = one
        return one

    for a, b in tied:
        if (first := root(a)) != (second := root(b)):
            parents[second] = first
    numbers: dict[Filter, int] = {}
    return {
        name: torch.tensor(
            [numbers.setdefault(root((name, i)), len(numbers)) for i in range(width)],
            dtype=torch.int32,
        )
        for name, width in widths.items()
    }


def visible_units(
    linears: Mapping[str, nn.Module],
    irregular: Collection[str],
    lost: Mapping[str, str],
    read: Collection[Filter],
) -> dict[str, str]:
    """Why the units of a linear layer are not hidden, by the layers of which this is so.

    Args:
        linears: the linear layers.
        irregular: layers that do not simply multiply their input by their own weight.
        lost: by layer with a filter that could not be followed everywhere, where it was lost.
        read: filters that a layer reads.
    """
    visible = {}
    for name, layer in linears.items():
        if layer._parameters.get("weight") is None:
            visible[name] = "its weight is computed from others, as by weight norm"
        elif name in irregular:
            visible[name] = "its weight is used elsewhere"
        elif name in lost:
            visible[name] = f"its units go into {lost[name]}"
        elif not all((name, index) in read for index in range(num_filters(layer))):
            visible[name] = "no layer reads all of its units"
    return visible
