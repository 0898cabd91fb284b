"""From which layers the values of a tensor come, whether or not its channels could be followed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether one is a view of the other, or both are of a third."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


class Origin(NamedTuple):
    """From which layers the values of a tensor come.

    Attributes:
        layers: the last layers with weights before it.
        convs: those of ``layers`` that are convs, with no matrix product since.
        shifted: those of ``convs`` whose zero has become a constant.
        weighted: whether it contains parameters outside of layers, such as a scale.
        weights: layers from whose parameters alone it is computed, as a penalty on weights is.
    """

    layers: frozenset[str] = frozenset()
    convs: frozenset[str] = frozenset()
    shifted: frozenset[str] = frozenset()
    weighted: bool = False
    weights: frozenset[str] = frozenset()


def together(origins: Iterable[Origin]) -> Origin:
    """The origin of a tensor that is computed from tensors of these origins, data among them."""
    origins = list(origins)
    return Origin(
        frozenset().union(*(origin.layers for origin in origins)),
        frozenset().union(*(origin.convs for origin in origins)),
        frozenset().union(*(origin.shifted for origin in origins)),
        any(origin.weighted for origin in origins),
    )


FUNCTIONAL = "a function with weights"
"""Stands for the name of a layer where an operation uses weights outside of layers."""
