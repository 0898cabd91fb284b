"""Averages of a model's weights that a trainer keeps and RePr was not told of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from repr_det.method.modules import unwrap

_DEPTH = 2
"""Objects inside a hook that are looked into: the state of an average is often one."""


def unknown_averages(
    holders: Iterable[Any], model: nn.Module, known: Iterable[nn.Module] = ()
) -> list[str]:
    """What has a tensor for each of a model's parameters, of its shape, and is neither of these.

    Args:
        holders: objects whose attributes are looked at: a trainer, its hooks.
        model: the model; wrappers are looked through.
        known: models that are no news.

    Returns:
        ``Class.attribute`` of each, without duplicates. A teacher of the model's architecture
        cannot be told from an average.
    """
    model = unwrap(model)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    taken = {id(p) for one in (model, *known) for p in unwrap(one).parameters()}
    found = {}
    for holder in holders:
        for name, tensors in _tensors_within(holder, holder.__class__.__name__, _DEPTH):
            fits = len(tensors) >= len(shapes) and _fit(tensors, shapes)
            if fits and not any(id(tensor) in taken for tensor in tensors.values()):
                found[name] = None
    return list(found)


def _tensors_within(holder: Any, name: str, depth: int) -> Iterator[tuple[str, dict[Any, Tensor]]]:
    for key, value in list(getattr(holder, "__dict__", {}).items()):
        path = f"{name}.{key}"
        if isinstance(value, nn.Module):
            yield path, dict(unwrap(value).named_parameters())
        elif isinstance(value, Mapping):
            yield path, {k: v for k, v in value.items() if isinstance(v, Tensor)}
        elif isinstance(value, (list, tuple)):
            yield path, {i: v for i, v in enumerate(value) if isinstance(v, Tensor)}
        elif depth > 1 and not isinstance(value, (type, Tensor)):
            yield from _tensors_within(value, path, depth - 1)


def _fit(tensors: dict[Any, Tensor], shapes: dict[str, Any]) -> bool:
    """Whether every parameter has its tensor: under its name, or all of them in its order."""
    in_order = [tensor.shape for tensor in tensors.values()] == list(shapes.values())
    return in_order or all(
        name in tensors and tensors[name].shape == shape for name, shape in shapes.items()
    )
