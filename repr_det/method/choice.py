"""Chooses the filters to prune from their scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from repr_det.errors import UserError
from repr_det.method.criteria import Scores
from repr_det.method.layers import FilterLayer
from repr_det.method.ranks import Group, distributed, from_first_rank, mean_over_ranks


def check_shares(prune_ratio: float, max_layer_ratio: float) -> None:
    """Refuse shares out of range.

    Raises:
        UserError: a share is out of range.
    """
    if not 0 < prune_ratio < 1:
        raise UserError(f"RePr: prune_ratio is {prune_ratio}. Set a share above 0 and below 1.")
    if not 0 < max_layer_ratio <= 1:
        raise UserError(
            f"RePr: max_layer_ratio is {max_layer_ratio}. Set a share above 0 and up to 1."
        )


def layer_limits(layers: Sequence[FilterLayer], max_layer_ratio: float) -> list[int]:
    """How many filters each layer may lose: its share, and never all of them."""
    # Without 1e-9, 0.7 of 10 would be 6, since floating point makes it 6.99...
    return [
        min(math.floor(max_layer_ratio * layer.num_filters + 1e-9), layer.num_filters - 1)
        for layer in layers
    ]


def number_to_prune(layers: Sequence[FilterLayer], ratio: float) -> int:
    """``ratio`` of all filters together, rounded down."""
    return math.floor(ratio * sum(layer.num_filters for layer in layers) + 1e-9)


def check_reachable(layers: Sequence[FilterLayer], ratio: float, max_layer_ratio: float) -> None:
    """Refuse a share of all filters that is less than one filter, or more than layers may lose.

    Raises:
        UserError: it is one of these.
    """
    wanted = number_to_prune(layers, ratio)
    total = sum(layer.num_filters for layer in layers)
    most = sum(layer_limits(layers, max_layer_ratio))
    if wanted == 0:
        raise UserError(
            f"RePr: prune_ratio {ratio} of {total} filters is less than one filter. "
            f"Raise it or include more layers."
        )
    if wanted > most:
        raise UserError(
            f"RePr: prune_ratio {ratio} of {total} filters is {wanted}, but max_layer_ratio "
            f"{max_layer_ratio} allows {most} at most. Raise max_layer_ratio or lower prune_ratio."
        )


def agreed_scores(
    scores: Scores, layers: Sequence[FilterLayer], criterion: str, group: Group = None
) -> Scores:
    """The mean of scores over ranks, on the CPU, with the same bits on all ranks.

    Args:
        scores: what the criterion returned on this rank.
        layers: the filter layers.
        criterion: its name.
        group: the ranks.

    Raises:
        UserError: the criterion did not return a score for each filter.
    """
    if not isinstance(scores, Mapping):
        raise UserError(
            f"RePr: criterion {criterion!r} returned {type(scores).__name__}. Return scores by "
            f"layer name."
        )
    for layer in layers:
        got = scores.get(layer.name)
        if not isinstance(got, Tensor) or got.shape != (layer.num_filters,):
            what = f"shape {tuple(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
            raise UserError(
                f"RePr: criterion {criterion!r} returned {what} for {layer.name}. Return a tensor "
                f"with a score for each of its {layer.num_filters} filters."
            )
    if not distributed(group):
        return {name: score.cpu() for name, score in scores.items()}
    device = layers[0].weight.device
    # Copies, since a criterion may keep what it returned.
    form = {"copy": True, "memory_format": torch.contiguous_format}
    own = {name: score.to(device, torch.float64, **form) for name, score in scores.items()}
    mean = {name: mean_over_ranks(score, group) for name, score in own.items()}
    return {name: score.cpu() for name, score in from_first_rank(mean, group).items()}


def choose(
    layers: Sequence[FilterLayer], scores: Scores, ratio: float, max_layer_ratio: float
) -> dict[str, Tensor]:
    """The filters to prune: the highest scores over all layers, up to each layer's limit.

    Of equal scores, those of earlier layers and filters are taken first.

    Args:
        layers: the filter layers.
        scores: by layer name, shape (J,).
        ratio: share of all filters to prune, in (0, 1).
        max_layer_ratio: largest share of one layer to prune.

    Returns:
        bool of shape (J,) by layer name, on the CPU.

    Raises:
        FloatingPointError: a score is NaN.
    """
    together = torch.cat([scores[layer.name].double().cpu() for layer in layers])
    sizes = [layer.num_filters for layer in layers]
    allowed = torch.zeros(len(together), dtype=torch.bool)
    limits = layer_limits(layers, max_layer_ratio)
    for layer, own, part, limit in zip(
        layers, together.split(sizes), allowed.split(sizes), limits, strict=True
    ):
        if own.isnan().any():
            raise FloatingPointError(
                f"RePr cannot rank the filters of {layer.name}: a score is not a number. Training "
                f"has diverged. Lower the learning rate or resume an earlier checkpoint."
            )
        part[_descending(own)[:limit]] = True
    order = _descending(together)
    chosen = torch.zeros_like(allowed)
    chosen[order[allowed[order]][: number_to_prune(layers, ratio)]] = True
    parts = chosen.split(sizes)
    return {layer.name: part.clone() for layer, part in zip(layers, parts, strict=True)}


def _descending(scores: Tensor) -> Tensor:
    """Positions by falling score; of equal ones the earlier first."""
    return torch.sort(scores, descending=True, stable=True).indices
