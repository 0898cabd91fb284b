"""What a module is, what wraps a model, and how to run a model and leave it unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)


def unwrap(model: nn.Module) -> nn.Module:
    """The model in DataParallel, DistributedDataParallel, AveragedModel or ``torch.compile``."""
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Like ``model.named_modules()``, each module once, wrappers looked through.

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

    Besides torch's own classes, anything that carries their attributes and a weight with
    spatial dimensions: the deformable convolutions of torchvision and Detectron2.
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


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises channels.

    torch's own classes, and by their tensors the ones that are no subclass of them: a module
    with one-dimensional ``weight`` and ``bias`` of one length (FrozenBatchNorm2d, Detectron2's
    channel-first LayerNorm and its norm per feature level).
    """
    if isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm)):
        return True
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    return (
        isinstance(weight, Tensor)
        and isinstance(bias, Tensor)
        and weight.dim() == bias.dim() == 1
        and len(weight) == len(bias)
        and not is_conv(module)
        and not isinstance(module, nn.Linear)
    )


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
    """Number of channels a norm expects, or None where it does not say."""
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor):
        return len(weight) if weight.dim() == 1 else None
    return getattr(norm, "num_features", getattr(norm, "num_channels", None))


def _numbers(module: nn.Module) -> dict[str, float]:
    attributes = vars(module).items()
    return {k: v for k, v in attributes if isinstance(v, (int, float)) and k != "training"}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Undo on leaving what running a model changes.

    Buffers, the mode of each module, numbers that modules keep as attributes (the loss normaliser
    of RetinaNet), and the random state.
    """
    modes = [(m, m.training) for m in model.modules()]
    numbers = [(m, _numbers(m), set(vars(m))) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = {b.device for b in model.parameters()} | {b.device for b in model.buffers()}
    try:
        with torch.random.fork_rng([d for d in devices if d.type == "cuda"]):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, before, attributes in numbers:
            for key in _numbers(module).keys() - attributes:
                delattr(module, key)
            for key, value in before.items():
                setattr(module, key, value)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def eager() -> Any:
    """While inside, compiled parts run uncompiled: compiled ones skip hooks set after they were."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    return set_stance("force_eager") if set_stance else nullcontext()
