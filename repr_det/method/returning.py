"""The values of filters before a drop, and those that they return with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from repr_det.method.layers import FilterLayer, NormLink, unit_rows
from repr_det.method.ranks import Group, from_first_rank, from_first_rank_in_place
from repr_det.method.reinit import Reinit, lengths_of, orthogonal_directions
from repr_det.method.threads import over_layers

Values = dict[str, Any]
"""The values of some filters of one layer, as :func:`values_of` reads them."""


def values_of(
    layers: Sequence[FilterLayer], pruned: dict[str, Tensor], reinit: Reinit, group: Group = None
) -> dict[str, Values]:
    """Everything that belongs to the pruned filters, by name of the layers that have some.

    Running statistics that train are included only where filters return as they were. They differ
    between ranks, so the first rank's are taken.

    Args:
        layers: the filter layers of one model, before the drop.
        pruned: bool of shape (J,) by layer name.
        reinit: how the filters will return.
        group: the ranks.
    """
    found = {
        layer.name: _values(layer, pruned[layer.name], reinit.as_it_was)
        for layer in layers
        if pruned[layer.name].any()
    }
    if reinit.as_it_was:
        norms = [norm for values in found.values() for norm in values["norms"]]
        statistics = [t for norm in norms for pair in norm["statistics"] for t in pair]
        from_first_rank_in_place(statistics, group)
    return found


def _values(layer: FilterLayer, chosen: Tensor, all_statistics: bool) -> Values:
    norms = []
    for link in layer.norms:
        channels = link.channels_of(chosen)
        affine = {key: tensor.detach()[channels] for key, tensor in link.affine.items()}
        statistics = [
            [mean[channels], var[channels]]
            for mean, var in link.running_statistics()
            if all_statistics or link.constant_statistics
        ]
        norms.append({**affine, "statistics": statistics})
    rows = chosen.nonzero().flatten().to(layer.weight.device)
    values = {"weight": layer.matrix().index_select(0, rows), "norms": norms}
    if layer.bias is not None:
        values["bias"] = layer.bias.detach()[chosen]
    if layer.per_filter:
        values["per_filter"] = {k: p.detach()[chosen] for k, p in layer.per_filter.items()}
    return values


def restore(
    layers: Sequence[FilterLayer], returned: dict[str, Tensor], before: dict[str, Values]
) -> None:
    """Set returned filters to what they were before the drop.

    Args:
        layers: the filter layers of one model.
        returned: bool of shape (J,) by layer name.
        before: what :func:`values_of` returned for these layers.
    """
    for layer in layers:
        if layer.name in before:
            _write(layer, returned[layer.name], before[layer.name])


def _write(layer: FilterLayer, chosen: Tensor, values: Values) -> None:
    layer.write_rows(chosen, values["weight"])
    if layer.bias is not None:
        _write_entries(layer.bias, chosen, values["bias"])
    for key, old in values.get("per_filter", {}).items():
        _write_entries(layer.per_filter[key], chosen, old)
    for link, old in zip(layer.norms, values["norms"], strict=True):
        channels = link.channels_of(chosen)
        for key, tensor in link.affine.items():
            _write_entries(tensor, channels, old[key])
        for pair, old_pair in zip(link.running_statistics(), old["statistics"], strict=True):
            for tensor, entries in zip(pair, old_pair, strict=True):
                _write_entries(tensor, channels, entries)


def _write_entries(tensor: Tensor, where: Tensor, values: Tensor) -> None:
    tensor.detach()[where] = values.to(tensor.device, tensor.dtype)


def new_rows(
    layers: Sequence[FilterLayer],
    returned: dict[str, Tensor],
    before: dict[str, Values],
    reinit: Reinit,
    generator: torch.Generator,
    group: Group = None,
) -> dict[str, Tensor]:
    """Weights of new filters, rows of shape (returned filters, d) by layer name.

    Args:
        layers: the filter layers; their surviving filters have their current values.
        returned: bool of shape (J,) by layer name.
        before: what :func:`values_of` returned.
        reinit: its ``norm`` and ``scale`` are used.
        generator: CPU source of the random numbers.
        group: the ranks. All get the first rank's rows.
    """
    returning = [layer for layer in layers if layer.name in before]
    # Threads finish in any order, so each layer has its own seed.
    seeds = torch.randint(2**62, (len(returning),), generator=generator).tolist()
    seed_of = {layer.name: seed for layer, seed in zip(returning, seeds, strict=True)}

    def rows_of(layer: FilterLayer) -> Tensor:
        chosen, rows = returned[layer.name].to(layer.weight.device), layer.matrix()
        # A copy, at least in float32.
        sets = rows.to(torch.promote_types(rows.dtype, torch.float32), copy=True)
        sets[chosen] = before[layer.name]["weight"].to(sets)
        units, lengths = unit_rows(sets.reshape(layer.groups, -1, layer.dimension))
        dropped = chosen.reshape(lengths.shape)
        source = torch.Generator().manual_seed(seed_of[layer.name])
        new = torch.cat(
            [orthogonal_directions(*one, source) for one in zip(units, dropped, strict=True)]
        )
        new *= lengths_of(reinit, lengths, dropped)[dropped].to(new.dtype)[:, None]
        return new.to(rows.dtype)

    rows = over_layers(rows_of, returning)
    return from_first_rank(
        {layer.name: new for layer, new in zip(returning, rows, strict=True)}, group
    )


def write_affine(layer: FilterLayer, returned: Tensor, before: Values, reinit: Reinit) -> None:
    """Set bias, gains, gamma and beta of returned filters (bool of shape (J,)) by ``reinit``.

    What does not train returns as it was, since it could not be learned again.
    """
    if layer.bias is not None:
        choice = reinit.beta if layer.bias.requires_grad else "previous"
        _write_choice(layer.bias, returned, ~returned, choice, before["bias"])
    for key, old in before.get("per_filter", {}).items():
        gain = layer.per_filter[key]
        choice = reinit.gamma if gain.requires_grad else "previous"
        _write_choice(gain, returned, ~returned, choice, old)
    for link, old in zip(layer.norms, before["norms"], strict=True):
        new, kept = link.channels_of(returned), link.channels_of(~returned)
        for key, tensor in link.affine.items():
            choice = getattr(reinit, key) if link.trains else "previous"
            _write_choice(tensor, new, kept, choice, old[key])


def _write_choice(tensor: Tensor, new: Tensor, kept: Tensor, choice: str, previous: Tensor) -> None:
    """Set entries of a one-dimensional tensor by a choice of :class:`Reinit`."""
    survivors = tensor.detach()[kept]
    if choice == "survivors" and len(survivors):
        values = survivors.mean()
    elif choice in ("survivors", "previous"):
        values = previous.to(tensor.device)
    else:
        values = torch.tensor({"one": 1.0, "zero": 0.0}[choice], device=tensor.device)
    tensor.detach()[new] = values.to(tensor.dtype)


def reset_statistics(
    layers: Sequence[FilterLayer], returned: dict[str, Tensor], before: dict[str, Values]
) -> list[tuple[NormLink, Tensor]]:
    """Set running statistics of returned channels: mean 0 and variance 1 where they train.

    Constant statistics are set to what they were before the drop.

    Returns:
        The norms with constant statistics, each with its returned channels. The caller measures
        these.
    """
    constant = []
    for layer in layers:
        for i, link in enumerate(layer.norms):
            channels = link.channels_of(returned[layer.name])
            if not len(channels):
                continue
            if not link.constant_statistics:
                for mean, var in link.running_statistics():
                    mean[channels], var[channels] = 0.0, 1.0
                link.begin_average()
                continue
            constant.append((link, channels))
            # Empty where the statistics trained at the drop.
            old = before[layer.name]["norms"][i]["statistics"]
            for pair, old_pair in zip(link.running_statistics(), old, strict=False):
                for tensor, entries in zip(pair, old_pair, strict=True):
                    _write_entries(tensor, channels, entries)
    return constant


def hand_over(
    source: Sequence[FilterLayer], target: Sequence[FilterLayer], returned: dict[str, Tensor]
) -> None:
    """Copy returned filters (bool of shape (J,) by layer) and their norms' statistics to a copy."""
    for mine, theirs in zip(source, target, strict=True):
        chosen = returned[mine.name]
        for a, b in zip(mine.filter_slots(chosen), theirs.filter_slots(chosen), strict=True):
            b.write(a.read())
        for link, other in zip(mine.norms, theirs.norms, strict=True):
            channels = link.channels_of(chosen)
            pairs = zip(link.running_statistics(), other.running_statistics(), strict=True)
            for (m1, v1), (m2, v2) in pairs:
                _write_entries(m2, channels, m1[channels])
                _write_entries(v2, channels, v1[channels])
