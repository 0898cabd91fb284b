"""Finds out what a module does by running it on a small input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from repr_det.method.channels import CONVOLUTIONS
from repr_det.method.layers import FilterLayer, NormLink
from repr_det.method.modules import eager, is_norm, unchanged


def counts_channels(norm: nn.Module, x: Tensor, dim: int) -> bool:
    """Whether a dimension of a norm's input counts its channels."""
    width = x.shape[dim]
    if list(x.shape).count(width) == 1:
        return True
    # Another dimension has the same length by chance. Try one where only this dimension has it.
    shape = [2 if width != 2 else 3] * x.dim()
    shape[dim] = width
    try:
        with _disable_current_modes(), unchanged(norm):
            norm.eval()
            norm.forward(torch.zeros(shape, device=x.device, dtype=x.dtype))
        return True
    except Exception:  # what an unknown module raises
        return False


def keeps_zeros(norm: nn.Module, x: Tensor, dim: int, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a norm's output is zero in channels where its input, scale and shift are zero.

    It is not where the scale is ``1 + weight`` after a mean over channels, where the norm
    normalises along another dimension, where an activation inside it does not keep zeros, or where
    something is added. Another norm inside it, which may run in training alone, has its own shift.

    Args:
        norm: the norm.
        x: its input.
        dim: the dimension that counts channels.
        args: with what it was called.
        kwargs: the same by name.
    """
    inner = (part for part in norm.modules() if part is not norm and is_norm(part))
    if any(getattr(part, "weight", None) is not None for part in inner):
        return False
    chosen = torch.arange(x.shape[dim]) % 2 == 0
    channels = chosen.nonzero().flatten()
    link, places = NormLink("", norm, channels, channels, dim), chosen.to(x.device)
    zeroed = x.masked_fill(places.view(-1, *[1] * (x.dim() - dim - 1)), 0.0)

    def with_zeros(value: Any) -> Any:
        return zeroed if value is x else value

    given = [with_zeros(value) for value in args]
    named = {key: with_zeros(value) for key, value in kwargs.items()}
    affine = list(link.affine.values())

    def is_zero() -> bool:
        norm.eval()  # synchronised norms wait for other processes in training
        for tensor in (*affine, *(mean for mean, _ in link.running_statistics())):
            tensor[places.to(tensor.device)] = 0.0
        return not norm.forward(*given, **named).movedim(dim, 0)[places].any()

    try:
        with _disable_current_modes():
            return _holds_for_other_values(norm, affine, is_zero)
    except Exception:  # a norm of an unknown kind may raise anything
        return False


def _holds_for_other_values(
    module: nn.Module, own: Sequence[Tensor], holds: Callable[[], bool]
) -> bool:
    """Whether it holds for several values of parameters that are not in ``own``.

    These may be zero now and train later.
    """
    others = [p for p in module.parameters() if all(p is not tensor for tensor in own)]
    for change in (0.0, 0.5, -0.5) if others else (0.0,):
        with unchanged(module), torch.no_grad():
            for parameter in others:
                parameter.add_(change)
            if not holds():
                return False
    return True


def is_silent(conv: nn.Module, shape: torch.Size) -> bool:
    """Whether a conv's output is zero where all that belongs to a filter is zero, tried on noise.

    It is not where the weight is computed from all filters, or something is added to the output.

    Args:
        conv: the conv.
        shape: of its input.
    """
    layer = FilterLayer("", conv)
    chosen = torch.arange(layer.num_filters) % 2 == 0
    weight, slots = layer.weight, layer.filter_slots(chosen)
    noise = _noise(layer, shape)
    places = chosen.nonzero().flatten().to(weight.device)
    dim = -(weight.dim() - 1)

    def is_zero() -> bool:
        with eager(), _Convolutions() as convolutions:
            for slot in slots:
                slot.fill(0.0)
            results = [conv(noise)]
        if any(map(is_norm, conv.modules())):
            results = convolutions.results  # before the norm, whose shift belongs to the filter
        return not any(result.index_select(dim, places).any() for result in results)

    try:
        return _holds_for_other_values(conv, [slot.tensor for slot in slots], is_zero)
    except Exception:  # a conv of an unknown kind may raise anything
        return False


def is_per_filter(conv: nn.Module, shape: torch.Size) -> bool:
    """Whether further parameters of a conv, one entry a filter, touch that filter alone.

    A gain of each input channel has as many entries where a conv has as many inputs as filters.

    Args:
        conv: the conv.
        shape: of its input.
    """
    layer = FilterLayer("", conv)
    own = layer.per_filter.values()
    if not own:
        return True
    noise = _noise(layer, shape)
    try:
        with unchanged(conv), eager(), torch.no_grad():
            before = conv(noise)
            for parameter in own:
                parameter[::2] += 1.0
            after = conv(noise)
    except Exception:  # a conv of an unknown kind may raise anything
        return False
    dim = -(layer.weight.dim() - 1)
    return torch.equal(*(out.movedim(dim, 0)[1::2] for out in (before, after)))


def _noise(layer: FilterLayer, shape: torch.Size) -> Tensor:
    """One random input of a layer that has inputs of this shape."""
    noise = torch.randn(1, *shape[1:], generator=torch.Generator().manual_seed(0))
    return noise.to(layer.weight.device, layer.weight.dtype)


class _Convolutions(TorchDispatchMode):
    """Keeps the results of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in CONVOLUTIONS:
            self.results.append(out)
        return out
