"""Kinds of modules, wrappers of a model, and running a model without changing it."""

from __future__ import annotations

import inspect
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)


def unwrap(model: nn.Module) -> nn.Module:
    """The model without DataParallel, DistributedDataParallel, AveragedModel, ``torch.compile``."""
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Like ``model.named_modules()``, without wrappers.

    No name contains ``module.`` of a parallel wrapper or ``_orig_mod.`` of ``torch.compile``.
    """
    seen: set[int] = set()

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        yield prefix, module
        for name, child in module.named_children():
            yield from walk(f"{prefix}.{name}" if prefix else name, child)

    yield from walk("", model)


def is_conv(module: nn.Module) -> bool:
    """Whether a module is a convolution.

    These are torch's own classes, and modules with their attributes and a weight with spatial
    dimensions: the deformable convolutions of torchvision and Detectron2.
    """
    if isinstance(module, _ConvNd):
        return True
    weight = getattr(module, "weight", None)
    attributes = ("in_channels", "out_channels", "kernel_size", "groups")
    return (
        isinstance(weight, Tensor)
        and weight.dim() >= 3
        and all(hasattr(module, a) for a in attributes)
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that computes what torch's own does."""
    own = type(module).forward is nn.Linear.forward and "forward" not in vars(module)
    return isinstance(module, nn.Linear) and own


def num_filters(layer: nn.Module) -> int:
    """Number of output channels of a conv, or of output units of a linear layer."""
    name = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
    return getattr(layer, name)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises channels.

    These are torch's own classes, and modules with a one-dimensional ``weight`` and a ``bias`` of
    the same length: FrozenBatchNorm2d, Detectron2's channel-first LayerNorm and its norm per
    feature level. Without a bias, the name or an epsilon must say that it normalises (RMSNorm).
    """
    if isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm)):
        return True
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or isinstance(module, nn.Linear):
        return False
    if isinstance(bias, Tensor):
        return weight.shape == bias.shape
    named = "norm" in type(module).__name__.lower()
    return bias is None and (named or any("eps" in key for key in vars(module)))


def mixes_channels(norm: nn.Module) -> bool:
    """Whether a norm computes its statistics over several channels at once."""
    if isinstance(norm, (nn.GroupNorm, nn.LayerNorm)):
        return True
    has_statistics = any(
        getattr(m, "running_mean", None) is not None or isinstance(m, _NormBase)
        for m in norm.modules()
    )
    return not has_statistics


def norm_channels(norm: nn.Module) -> int | None:
    """Number of channels that a norm expects, or None where that is not known."""
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor):
        return len(weight) if weight.dim() == 1 else None
    return getattr(norm, "num_features", getattr(norm, "num_channels", None))


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Undo on leaving everything that running a model changes.

    Restores all attributes of its modules: parameters and buffers (the same tensors, with the
    values and shapes that they had), the contents of lists, dicts, sets and tensors, modes and
    hooks. Removes what a run adds. Restores the random states of torch, Python and NumPy, too.
    """
    wrappers = [(m, m.training) for m in model.modules() if unwrap(m) is not m]
    seen: dict[int, Callable[[], Any]] = {}
    attributes = [_remembered(vars(module), seen) for _, module in named_modules(model)]
    devices = {b.device for b in (*model.parameters(), *model.buffers())}
    numbers = random.getstate()
    numpy = sys.modules.get("numpy")  # where it is not imported, nothing draws from it
    of_numpy = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng([d for d in devices if d.type == "cuda"]):
            yield
    finally:
        random.setstate(numbers)
        if numpy:
            numpy.random.set_state(of_numpy)
        for module, training in wrappers:
            module.training = training
        with torch.no_grad():
            for restore in attributes:
                restore()


def _remembered(value: Any, seen: dict[int, Callable[[], Any]]) -> Callable[[], Any]:
    """A function that restores the contents of a value and returns it. Modules are not restored.

    Args:
        value: anything.
        seen: the functions made so far, by id of their value.
    """
    if id(value) not in seen:
        seen[id(value)] = lambda: value  # in case the value contains itself
        seen[id(value)] = _with_contents(value, seen)
    return seen[id(value)]


def _with_contents(value: Any, seen: dict[int, Callable[[], Any]]) -> Callable[[], Any]:
    if isinstance(value, Tensor):
        return _tensor_restored(value)
    if isinstance(value, dict):
        items = [(key, _remembered(part, seen)) for key, part in value.items()]

        def restore_dict() -> Any:
            before = [(key, restore()) for key, restore in items]
            value.clear()
            value.update(before)
            return value

        return restore_dict
    if isinstance(value, (list, deque, set)):
        parts = [_remembered(part, seen) for part in value]

        def restore_collection() -> Any:
            before = [restore() for restore in parts]
            value.clear()
            value.update(before) if isinstance(value, set) else value.extend(before)
            return value

        return restore_collection
    if isinstance(value, tuple):
        held = [_remembered(part, seen) for part in value]
        return lambda: ([restore() for restore in held], value)[1]
    if isinstance(value, SimpleNamespace) or is_dataclass(value):
        restore = _remembered(vars(value), seen) if hasattr(value, "__dict__") else None
        return lambda: (restore and restore(), value)[1]
    return lambda: value


def _shares_entries(tensor: Tensor) -> bool:
    """Whether entries share memory, as after ``expand``. Torch refuses to write to them."""
    if tensor.layout != torch.strided:
        return False
    return any(step == 0 and n > 1 for step, n in zip(tensor.stride(), tensor.shape, strict=True))


def _tensor_restored(tensor: Tensor) -> Callable[[], Tensor]:
    if is_lazy(tensor) or _shares_entries(tensor):
        return lambda: tensor
    before = tensor.detach().clone()

    def restore() -> Tensor:
        if tensor.shape == before.shape:
            tensor.detach().copy_(before)
        else:
            tensor.data = before
        return tensor

    return restore


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """While inside, reading weights changes nothing, and a run sees what was written into them.

    To read a weight under spectral norm would iterate. If the caller's autocast is on, it would go
    on with the copies of the weights that it has made.
    """
    parts = [
        part
        for module in model.modules()
        if parametrize.is_parametrized(module)
        for part in module.parametrizations.modules()
        if part.training
    ]
    keeps_copies = torch.is_autocast_cache_enabled()
    for part in parts:
        part.training = False
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(keeps_copies)
        for part in parts:
            part.training = True


@contextmanager
def own_gradients(model: nn.Module) -> Iterator[None]:
    """While inside, gradients are copies: what is added to them is gone afterwards."""
    gradients = [(p, p.grad) for p in model.parameters()]
    for p, gradient in gradients:
        p.grad = None if gradient is None else gradient.clone()
    try:
        yield
    finally:
        for p, gradient in gradients:
            p.grad = gradient


def eager() -> Any:
    """While inside, compiled parts run uncompiled: they would skip hooks that were added later."""
    return torch.compiler.set_stance("force_eager")


def with_input(function: Callable, name: str) -> Callable:
    """A module hook that calls ``function(name, input, all arguments, *output)``."""

    def hook(module: nn.Module, args: tuple, kwargs: dict, *output: Any) -> None:
        x = args[0] if args else None
        if not args and kwargs:
            first = next(iter(inspect.signature(module.forward).parameters))
            x = kwargs.get(first, next(iter(kwargs.values())))
        function(name, x, (args, kwargs), *output)

    return hook
