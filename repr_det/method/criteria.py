"""Scores that rank filters: the larger, the sooner pruned.

Every criterion has the signature ``criterion(layers, data) -> {layer name: scores (J,)}``, and a
user's own function may be used instead. It runs under ``torch.no_grad()``; what needs gradients
goes under ``torch.enable_grad()``. What it does to the model and to its gradients is undone
afterwards. Criteria that use training batches are in ``data_criteria``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repr_det.errors import UserError
from repr_det.method import data_criteria
from repr_det.method.layers import FilterLayer, unit_rows
from repr_det.method.ranks import Group
from repr_det.method.threads import over_layers


class Data(NamedTuple):
    """What a criterion may use in addition to the weights.

    Attributes:
        model: the model without wrappers.
        batches: returns a fresh iterator of batches, or None.
        loss: ``loss(model, batch)`` returns a scalar, or None.
        generator: CPU source of random numbers that depends on seed and cycle only.
        progress: wraps the filters that a slow criterion iterates over, to show its progress.
        group: the ranks. Each computes scores on its own batches.
    """

    model: nn.Module
    batches: Callable[[], Iterator[Any]] | None
    loss: Callable[[nn.Module, Any], Tensor] | None
    generator: torch.Generator
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter
    group: Group = None


Scores = dict[str, Tensor]
Criterion = Callable[[Sequence[FilterLayer], Data], Scores]


def chance_overlap(dimension: int) -> float:
    """Mean |cosine| of two random directions in ``dimension`` dimensions.

    ``Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2))``, the first absolute moment of one coordinate of a
    uniform unit vector; about ``sqrt(2 / (pi d))``.
    """
    return math.exp(math.lgamma(dimension / 2) - math.lgamma((dimension + 1) / 2)) / math.sqrt(
        math.pi
    )


def _units(layer: FilterLayer) -> tuple[Tensor, Tensor]:
    """Unit filters of a layer, and which are of zero norm.

    Returns:
        Filters of shape (groups, J / groups, d), where zero filters stay zero, and bool of shape
        (groups, J / groups).
    """
    rows = layer.matrix()
    # float32 may mean less on a GPU (TF32), and is twice as fast as float64 on a CPU.
    rows = rows.double() if rows.is_cuda or rows.dtype == torch.float64 else rows.float()
    units, lengths = unit_rows(rows.reshape(layer.groups, -1, layer.dimension))
    return units, lengths == 0


def overlap_sums(units: Tensor) -> Tensor:
    """Row sums of ``P = |W W^T - I|`` (paper, equation 1): |cosine| to all others, summed.

    Args:
        units: shape (groups, J, d), rows of length one or zero. A zero row overlaps with none.

    Returns:
        float64 of shape (groups, J), without the diagonal.
    """
    overlap = (units @ units.mT).abs_()
    overlap.diagonal(dim1=1, dim2=2).zero_()
    return overlap.sum(dim=2, dtype=torch.float64)


def _by_name(layers: Sequence[FilterLayer], score: Callable[[FilterLayer], Tensor]) -> Scores:
    """Scores by layer name; ``score`` returns those of one layer, shape (groups, J / groups)."""
    scores = over_layers(lambda layer: score(layer).flatten(), layers)
    return {layer.name: found for layer, found in zip(layers, scores, strict=True)}


def ortho_paper(layers: Sequence[FilterLayer], data: Data | None = None) -> Scores:
    """The paper's score as printed: ``O[f] = sum(P[f]) / J`` (paper, equations 1 and 2).

    Rows are normalised one by one. In a grouped convolution J counts the filters of a group. It
    cannot be compared between layers of different dimension; see :func:`ortho`. A filter of zero
    norm scores infinity.
    """

    def score(layer: FilterLayer) -> Tensor:
        units, zero = _units(layer)
        return (overlap_sums(units) / units.shape[1]).masked_fill(zero, math.inf)

    return _by_name(layers, score)


def ortho(layers: Sequence[FilterLayer], data: Data | None = None) -> Scores:
    """Inter-filter orthogonality made comparable between layers; the default.

    Mean |cosine| of a filter to the other filters of its layer (of its group), divided by its
    expected value for random directions of that dimension (:func:`chance_overlap`). Zero filters do
    not count as others and score infinity. After the paper's section 4; the division is ours.
    """

    def score(layer: FilterLayer) -> Tensor:
        units, zero = _units(layer)
        others = (~zero).sum(dim=1, keepdim=True) - 1
        mean = overlap_sums(units) / others.clamp(min=1)
        return (mean / chance_overlap(layer.dimension)).masked_fill(zero, math.inf)

    return _by_name(layers, score)


def ortho_authors(layers: Sequence[FilterLayer], data: Data | None = None) -> Scores:
    """The variant that the authors' public code computes.

    The layer is normalised as a whole (its Frobenius norm), and the absolute value is taken after
    averaging: ``|mean_g (W W^T - I)[f, g]|`` with ``W`` divided by its norm.
    """
    scores = {}
    for layer in layers:
        rows = layer.matrix().double().reshape(layer.groups, -1, layer.dimension)
        rows = rows / rows.norm().clamp(min=torch.finfo(rows.dtype).tiny)
        means = (rows * rows.mean(dim=1, keepdim=True)).sum(dim=2) - 1 / rows.shape[1]
        scores[layer.name] = means.abs().flatten()
    return scores


def weights(layers: Sequence[FilterLayer], data: Data | None = None) -> Scores:
    """Minus the mean |weight| of a filter: small filters go first (Li et al., ICLR 2017).

    The mean instead of the sum makes layers of different dimension comparable.
    """
    return {layer.name: -layer.matrix().double().abs().mean(dim=1) for layer in layers}


def random(layers: Sequence[FilterLayer], data: Data) -> Scores:
    """Uniform random scores: the control that any ranking has to beat."""
    return {
        layer.name: torch.rand(layer.num_filters, generator=data.generator, dtype=torch.float64)
        for layer in layers
    }


CRITERIA: dict[str, Criterion] = {
    "ortho": ortho,
    "ortho_paper": ortho_paper,
    "ortho_authors": ortho_authors,
    "weights": weights,
    "random": random,
    "activations": data_criteria.activations,
    "apoz": data_criteria.apoz,
    "gradients": data_criteria.gradients,
    "taylor": data_criteria.taylor,
    "hessian": data_criteria.hessian,
    "oracle": data_criteria.oracle,
}

NEEDS_DATA = {"activations", "apoz", "gradients", "taylor", "hessian", "oracle"}
"""Criteria that need batches and a loss."""


def check_criterion(criterion: str | Criterion, has_data: bool) -> bool:
    """Refuse an unknown name, and one that needs batches where there are none.

    Returns:
        Whether it needs batches and a loss.

    Raises:
        UserError: it cannot be used.
    """
    if not isinstance(criterion, str):
        if not callable(criterion) or isinstance(criterion, type):
            raise UserError(f"RePr: criterion is {criterion!r}. Set a name or a function.")
        return False
    if criterion not in CRITERIA:
        raise UserError(f"RePr: criterion is {criterion!r}. Set one of {', '.join(CRITERIA)}.")
    if criterion in NEEDS_DATA and not has_data:
        raise UserError(
            f"RePr: criterion {criterion!r} looks at training batches. Pass batches= and loss=."
        )
    return criterion in NEEDS_DATA


def name_of(criterion: str | Criterion) -> str:
    """What a ranking is called in messages and checkpoints."""
    if isinstance(criterion, str):
        return criterion
    return getattr(criterion, "__name__", type(criterion).__name__)


def filter_overlap(layers: Sequence[FilterLayer], pruned: dict[str, Tensor]) -> Scores:
    """Plain score (:func:`ortho_paper`) of the surviving filters of each layer, among themselves.

    Args:
        layers: the filter layers.
        pruned: bool of shape (J,) by layer name.

    Returns:
        float64 (J,) by layer name, NaN for filters that are pruned or of zero norm.
    """

    def score(layer: FilterLayer) -> Tensor:
        units, zero = _units(layer)
        kept = ~(pruned[layer.name].reshape(zero.shape).to(zero.device) | zero)
        per_group = kept.sum(dim=1, keepdim=True).clamp(min=1)
        mean = overlap_sums(units * kept[..., None]) / per_group
        return mean.masked_fill(~kept, math.nan)

    return _by_name(layers, score)


def mean_overlap(overlap: Scores) -> dict[str, float]:
    """Mean over the surviving filters of each layer of :func:`filter_overlap`; 0 without any."""
    means = {}
    for name, score in overlap.items():
        surviving = score[~score.isnan()]
        means[name] = float(surviving.mean()) if len(surviving) else 0.0
    return means
