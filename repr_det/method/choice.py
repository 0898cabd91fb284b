"""The choice: scores -> pruned filters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from repr_det.method.criteria import Scores
from repr_det.method.layers import FilterLayer


def layer_limits(layers: Sequence[FilterLayer], max_layer_ratio: float) -> list[int]:
    """How many filters each layer may lose: its share, and never all of them."""
    # The small shift keeps a share such as 0.7 of 10 at 7, which floating point makes 6.99...
    return [
        min(math.floor(max_layer_ratio * layer.num_filters + 1e-9), layer.num_filters - 1)
        for layer in layers
    ]


def number_to_prune(layers: Sequence[FilterLayer], ratio: float) -> int:
    """``ratio`` of all filters together, rounded down."""
    return math.floor(ratio * sum(layer.num_filters for layer in layers) + 1e-9)


def choose(
    layers: Sequence[FilterLayer], scores: Scores, ratio: float, max_layer_ratio: float
) -> dict[str, Tensor]:
    """The filters to prune: the highest scores over all layers, up to each layer's limit.

    Equal scores are taken in the order of layers and filters, so that the choice depends on nothing
    else.

    Args:
        layers: the filter layers.
        scores: by layer name, shape (J,).
        ratio: share of all filters to prune, in (0, 1).
        max_layer_ratio: share of one layer that may go.

    Returns:
        bool of shape (J,) by layer name, on the CPU.

    Raises:
        FloatingPointError: a score that is not a number.
    """
    together = torch.cat([scores[layer.name].double().cpu() for layer in layers])
    sizes = [layer.num_filters for layer in layers]
    owner = torch.repeat_interleave(torch.tensor(sizes))
    unknown = together.isnan()
    if unknown.any():
        raise FloatingPointError(
            f"RePr cannot rank the filters of {layers[owner[unknown][0]].name}: a score is not a "
            f"number; training has diverged, lower the learning rate or resume an earlier "
            f"checkpoint."
        )
    order = torch.sort(together, descending=True, stable=True).indices
    # How many of a filter's own layer come before it; those within the layer's limit may go.
    by_layer = torch.sort(owner[order], stable=True).indices
    before = torch.empty_like(order)
    before[by_layer] = torch.cat([torch.arange(size) for size in sizes])
    within = before < torch.tensor(layer_limits(layers, max_layer_ratio))[owner[order]]
    chosen = torch.zeros(len(together), dtype=torch.bool)
    chosen[order[within][: number_to_prune(layers, ratio)]] = True
    parts = chosen.split(sizes)
    return {layer.name: part.clone() for layer, part in zip(layers, parts, strict=True)}
