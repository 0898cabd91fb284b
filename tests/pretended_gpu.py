"""Tensors that say they lie on a GPU, for trying code for one where there is none.

Their values lie on the CPU. What is checked is what a GPU would refuse: operations between devices,
indices that do not lie where they must, random generators of another device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.device import DEVICE

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")

_MOVES = {"aten::copy_", "aten::_to_copy"}
_INDEX_ANYWHERE = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"}
"""Here indices of a tensor on a GPU may lie on the CPU."""


class OnGpu(Tensor):
    """A tensor that says it lies on a GPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnGpu:
        new = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=values.device,
        )
        new.values = values
        return new

    device = GPU
    is_cuda = True

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.tolist:
            return args[0].values.tolist()
        if func is Tensor.numpy:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is Tensor.cpu:
            return _moved(args[0], CPU)
        if func is Tensor.to:
            return _to(*args, **kwargs)
        if func == Tensor.data.__set__:
            _check_alike(*args)
            args[0].values = args[1].values
        if func == Tensor.grad.__set__ and args[1] is not None:
            _check_alike(*args)
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name not in _MOVES:
            _check_devices(name, args, kwargs)
        out = func(*tree_map(_values, args), **tree_map(_values, kwargs))
        if func._schema.is_mutable:
            return args[0] if out is not None else None
        return tree_map(_on_gpu, out)


def _values(x: Any) -> Any:
    return x.values if isinstance(x, OnGpu) else x


def _on_gpu(x: Any) -> Any:
    return OnGpu(x) if isinstance(x, Tensor) and not isinstance(x, OnGpu) else x


def _check_alike(a: Tensor, b: Tensor) -> None:
    if isinstance(a, OnGpu) != isinstance(b, OnGpu):
        raise RuntimeError("expected both tensors to be on the same device")


def _check_devices(name: str, args: Any, kwargs: Any) -> None:
    """What the CUDA kernels refuse. Numbers (tensors without dimensions) may lie on the CPU."""
    elsewhere = [
        t
        for t in tree_leaves((args, kwargs))
        if isinstance(t, Tensor) and not isinstance(t, OnGpu) and t.dim() > 0
    ]
    if name in _INDEX_ANYWHERE and isinstance(args[0], OnGpu):
        indices = {id(t) for t in tree_leaves(args[1])}
        elsewhere = [t for t in elsewhere if id(t) not in indices]
    if elsewhere:
        shapes = [tuple(t.shape) for t in elsewhere]
        raise RuntimeError(f"{name}: expected all tensors on one device, {shapes} are on the CPU")


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``Tensor.to`` in the forms ``(device)``, ``(dtype)``, ``(device, dtype)`` and ``(other)``."""
    dtype = kwargs.pop("dtype", None)
    device = kwargs.pop("device", None)
    for value in args:
        if isinstance(value, Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (torch.device, str)):
            device = torch.device(value)
    if device is not None:
        x = _moved(x, device)
    with torch._C.DisableTorchFunctionSubclass():
        return x if dtype is None and not kwargs else Tensor.to(x, dtype or x.dtype, **kwargs)


def _moved(x: Tensor, device: torch.device) -> Tensor:
    if (device.type == "cuda") == isinstance(x, OnGpu):
        return x
    assert not (x.requires_grad and torch.is_grad_enabled()), "moves are not differentiated here"
    return x.values.clone() if isinstance(x, OnGpu) else OnGpu(x.detach().clone())


class _Factories(TorchFunctionMode):
    """Makes tensors with ``device="cuda"``, and moves others there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.to:
            return _to(*args, **kwargs)
        on_gpu = isinstance(kwargs.get("device"), torch.device) and kwargs["device"] == GPU
        if kwargs.get("generator") is not None and (on_gpu or any(map(_is_on_gpu, args))):
            raise RuntimeError("expected a 'cuda' device type for generator but found 'cpu'")
        if on_gpu:
            return _on_gpu(func(*args, **{**kwargs, "device": CPU}))
        return func(*args, **kwargs)


def _is_on_gpu(x: Any) -> bool:
    return isinstance(x, OnGpu)


def moved_to_gpu(model: nn.Module) -> nn.Module:
    """The model with all its tensors on the GPU, in place."""
    if DEVICE.type == "cuda":
        return model.to(GPU)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                on_gpu = OnGpu(parameter.detach().clone())
                module._parameters[name] = nn.Parameter(on_gpu, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnGpu(buffer.clone())
    return model


@contextmanager
def a_gpu() -> Iterator[Callable[[Tensor], Tensor]]:
    """While inside, there is a GPU: the tests' device if it is one, else a pretended one."""
    if DEVICE.type == "cuda":
        torch.use_deterministic_algorithms(True)
        yield lambda x: x.to(GPU)
    else:
        with pretended_gpu() as moved:
            yield moved


@contextmanager
def pretended_gpu() -> Iterator[Callable[[Tensor], Tensor]]:
    """While inside, there is one; yields what moves a tensor there."""
    fork_rng = torch.random.fork_rng
    with pytest.MonkeyPatch.context() as patch, _Factories():
        patch.setattr(torch.random, "fork_rng", lambda devices=None: fork_rng([]))
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        yield OnGpu
