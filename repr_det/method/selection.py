"""Which layers take part: patterns and defaults."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from types import MappingProxyType

from torch import Tensor, nn

from repr_det.errors import UserError
from repr_det.method.graph import Reader
from repr_det.method.layers import FilterLayer
from repr_det.method.modules import num_filters


def list_of(patterns: Sequence[str] | None) -> list[str]:
    """Patterns as a list, empty for None.

    Raises:
        UserError: they are one string, whose characters would be taken for patterns.
    """
    if isinstance(patterns, str):
        raise UserError(
            f"RePr: include or exclude is {patterns!r}. Set a list of patterns, as [{patterns!r}]."
        )
    return list(patterns or ())


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted name, or the name of a module that contains it, matches a pattern."""
    parts = name.split(".")
    ancestors = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(a, p) for p in patterns for a in ancestors)


def names_itself(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches the whole dotted name, not only that of a parent."""
    return any(fnmatchcase(name, p) for p in patterns)


def select_layers(
    convs: Mapping[str, nn.Module],
    linears: Mapping[str, nn.Module] = MappingProxyType({}),
    *,
    stems: Collection[str],
    heads: Collection[str],
    gates: Collection[str],
    trained: Collection[int],
    has_backbone: bool,
    visible: Mapping[str, str] = MappingProxyType({}),
    linear: bool = False,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> list[str]:
    """Names of the layers that take part.

    By default these are the convs below ``backbone``, or all convs where the model has no backbone.
    With ``linear``, linear layers take part everywhere. Stems, heads and gates do not take part;
    in a backbone, heads do.

    With ``include``, these are the layers that a pattern matches. Stems, heads and gates must be
    matched by their own name. A pattern takes linear layers with ``linear``, or where it matches no
    conv.

    Depthwise and single-filter layers never take part, since a filter has no other to be compared
    with. Nor do complex layers, since criteria are of real numbers, layers whose weight does not
    train, and linear layers whose units are not hidden.

    Args:
        convs: all convs of the model by dotted name.
        linears: all linear layers by dotted name.
        stems: names of layers that read the image.
        heads: names of prediction layers.
        gates: names of layers whose output multiplies other channels, for example after a sigmoid.
        trained: ``id`` of every parameter that the optimizer trains.
        has_backbone: whether the model has a module called ``backbone``.
        visible: why its units are not hidden, by linear layer of which this is so.
        linear: whether linear layers take part that no pattern names.
        include: shell-style patterns. A pattern also matches everything below a module.
        exclude: patterns of layers that take no part, also where ``include`` matches them.

    Raises:
        UserError: a pattern matches nothing that can take part, or no layer is left that trains and
            has filters to compare.
    """
    include, exclude = list_of(include), list_of(exclude)
    _check_patterns(convs, linears, visible, include, exclude)
    layers = {**convs, **linears}
    special = {*stems, *heads, *gates}
    if include:
        of_linears = [p for p in include if linear or not _any_matches(convs, p)]
        names = [name for name in convs if matches(name, include)]
        names += [name for name in linears if matches(name, of_linears)]
        names = [n for n in names if n not in special or names_itself(n, include)]
    else:
        if has_backbone:
            names = [n for n in convs if n.startswith("backbone.") and n not in {*stems, *gates}]
        else:
            names = [n for n in convs if n not in special]
        names += [n for n in linears if linear and n not in special]
    names = [n for n in names if n not in visible and not matches(n, exclude)]
    trainable = [n for n in names if id(layers[n].weight) in trained]
    kind = "conv or linear" if linear or not {*names} <= {*convs} else "conv"
    if not trainable:
        why = _why_none(layers, names, visible, linear)
        raise UserError(f"RePr found no filters to drop: {why}")
    comparable = [n for n in trainable if _is_comparable(layers[n])]
    if not comparable:
        raise UserError(
            f"RePr found nothing to compare: all {len(trainable)} matching {kind} layers are "
            f"depthwise, complex or have a single filter. Change INCLUDE/EXCLUDE."
        )
    return comparable


def _is_comparable(layer: nn.Module) -> bool:
    """Whether a criterion can compare a filter with another one of its group."""
    in_a_group = num_filters(layer) // getattr(layer, "groups", 1)
    return in_a_group > 1 and not layer.weight.is_complex()


def _why_none(
    layers: Mapping[str, nn.Module], names: list[str], visible: Mapping[str, str], linear: bool
) -> str:
    """Why none of the selected layers (``names``) trains, and what to change."""
    if not names:
        convs = sum(not isinstance(layer, nn.Linear) for layer in layers.values())
        why = f"of the {convs} conv layers, all read the image, predict, are gates or match no "
        why = f"{why}pattern" if convs else "the model has no conv layer"
        if not linear:
            return (
                f"{why}, and linear layers take part only where they are chosen. Change "
                f"INCLUDE/EXCLUDE, set REPR.LINEAR to True (linear=True), or train a model with "
                f"more layers."
            )
        hidden = [n for n in layers if isinstance(layers[n], nn.Linear) and n not in visible]
        if hidden:
            why += (
                f", and {hidden[0]} reads the input or is excluded. Name it in INCLUDE to take it"
            )
        elif visible:
            largest = max(visible, key=lambda name: layers[name].weight.numel())
            why += f", and no linear layer has hidden units: of {largest}, {visible[largest]}"
        return f"{why}. Change INCLUDE/EXCLUDE, or train a model with more layers."
    weights = [layers[name].weight for name in names]
    if any(not isinstance(weight, nn.Parameter) for weight in weights):
        return (
            f"the weight of {names[0]} is computed from others, as by weight norm. Remove the "
            f"parametrization before training."
        )
    if any(weight.requires_grad for weight in weights):
        return f"of the {len(names)} that match, none is in the optimizer. Add their weights to it."
    return f"the {len(names)} that match are frozen. Unfreeze some, or change INCLUDE/EXCLUDE."


def trained_elsewhere(
    layers: Sequence[FilterLayer], readers: Sequence[Reader], trained: Collection[int]
) -> dict[str, str]:
    """Layers whose filters could not be held exactly, since another optimizer may train a part.

    A parameter that requires gradients and is not in this optimizer may be in another one, whose
    momentum would move it. The part is a filter's bias, gamma or beta, or a weight that reads it.

    Args:
        layers: all convs and linear layers.
        readers: the layers that read them.
        trained: ``id`` of every parameter that this optimizer trains.

    Returns:
        By name of the layer, the name of the module with such a part.
    """

    def elsewhere(*tensors: Tensor | None) -> bool:
        return any(t is not None and t.requires_grad and id(t) not in trained for t in tensors)

    found = {}
    for layer in layers:
        if elsewhere(layer.bias, *layer.per_filter.values()):
            found[layer.name] = layer.name
        for link in layer.norms:
            if elsewhere(*link.affine.values()):
                found[layer.name] = link.name
    for reader in readers:
        if elsewhere(reader.module.weight):
            found.update(dict.fromkeys(reader.filters, reader.name))
    return found


def followed(selected: Collection[str], partly: Mapping[str, str], scales: bool) -> set[str]:
    """Selected layers without those with which the optimizer would not be exact.

    Args:
        selected: names of layers.
        partly: layers whose filters meet more than the columns of layers, and what they meet.
        scales: whether weights without a gradient change the steps of others in the optimizer. A
            weight that reads zeros and is not zero itself does so then.
    """
    left_out = partly.keys() & set(selected) if scales else set()
    if left_out:
        name = min(left_out)
        warnings.warn(
            f"RePr: {name}{' and others' * (len(left_out) > 1)} cannot lose filters, because they "
            f"go into {partly[name]}, and the optimizer scales steps by the lengths of whole "
            f"weights. Use an optimizer such as SGD or AdamW to let it take part.",
            stacklevel=6,  # at the call of RePr() or step()
        )
    return set(selected) - left_out


def _any_matches(names: Collection[str], pattern: str) -> bool:
    return any(matches(name, [pattern]) for name in names)


def _check_patterns(
    convs: Collection[str],
    linears: Collection[str],
    visible: Mapping[str, str],
    include: Sequence[str],
    exclude: Sequence[str],
) -> None:
    """Refuse patterns that match no layer, or only linear layers that cannot take part."""
    for key, patterns in (("INCLUDE", include), ("EXCLUDE", exclude)):
        for pattern in patterns:
            if _any_matches(convs, pattern):
                continue
            found = [name for name in linears if matches(name, [pattern])]
            if not found:
                known = [*convs, *linears]
                some = ", ".join(known[:: max(1, len(known) // 5)][:6])
                raise UserError(
                    f"RePr {key} pattern {pattern!r} matches no conv or linear layer; "
                    f"names that exist are, for example: {some}."
                )
            if key == "INCLUDE" and all(name in visible for name in found):
                raise UserError(
                    f"RePr INCLUDE pattern {pattern!r} matches only linear layers whose units are "
                    f"not hidden: {found[0]} cannot take part, {visible[found[0]]}. Name layers "
                    f"that only other layers read, through operations that keep a zero zero."
                )


def separable(layers: Sequence[FilterLayer], names: Collection[str]) -> list[FilterLayer]:
    """The layers of the given names whose filters can be dropped without touching any others.

    Layers that share a weight become one layer: the first that holds it, with the norms after all
    of them. They are left out where one of them does not take part, or where they do not share
    their bias, since a filter has one bias. Layers that share anything other than their weight are
    left out, too: for example a norm that is called after several layers.

    Args:
        layers: all convs and linear layers.
        names: names of those that are to take part.
    """
    by_weight: dict[Tensor, list[FilterLayer]] = {}
    owners: dict[tuple, set[Tensor]] = {}
    for layer in layers:
        by_weight.setdefault(layer.weight, []).append(layer)
        for part in _parts(layer):
            owners.setdefault(part, set()).add(layer.weight)
    not_alone = {weight for weights in owners.values() if len(weights) > 1 for weight in weights}
    found = []
    for weight, (first, *others) in by_weight.items():
        # A transposed conv counts its filters along another dimension of the same weight.
        alike = all(
            (other.bias is first.bias, other.transposed, other.groups)
            == (True, first.transposed, first.groups)
            for other in others
        )
        selected = all(layer.name in names for layer in (first, *others))
        if alike and selected and weight not in not_alone:
            # After several convs, one norm may have a part of its channels for each.
            norms = {
                (link.name, *link.channels.tolist()): link
                for layer in (first, *others)
                for link in layer.norms
            }
            found.append(replace(first, norms=tuple(norms.values())))
    return found


def _parts(layer: FilterLayer) -> Iterator[tuple]:
    """Keys of all that is zero while the filters of a layer are pruned, except its weight."""
    for tensor in (layer.bias, *layer.per_filter.values()):
        if tensor is not None:
            yield (id(tensor),)
    for link in layer.norms:
        for part in (link.name, *(id(t) for t in link.affine.values())):
            for channel in link.channels.tolist():
                yield part, channel
