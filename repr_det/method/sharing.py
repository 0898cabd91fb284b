"""Which modules hold which tensors, and which layers share tensors."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from repr_det.method.modules import is_conv, is_norm


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a conv, a norm or a linear layer."""
    return is_conv(module) or is_norm(module) or isinstance(module, nn.Linear)


def names_and_holders(
    modules: dict[str, nn.Module],
) -> tuple[dict[int, str], dict[int, list[str]]]:
    """The name of each parameter, and the layers that hold each parameter or buffer, by id."""
    names: dict[int, str] = {}
    holders: dict[int, list[str]] = {}
    for name, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), f"{name}.{key}" if name else key)
        if is_layer(module):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    holders.setdefault(id(tensor), []).append(name)
    return names, holders


def shared_layers(
    modules: dict[str, nn.Module], holders: dict[int, list[str]]
) -> dict[str, set[str]]:
    """By layer that shares a tensor, all modules that hold one of its tensors."""
    by_tensor: dict[int, set[str]] = {}
    for name, module in modules.items():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) in holders:
                by_tensor.setdefault(id(tensor), set()).add(name)
    shared: dict[str, set[str]] = {}
    for key, names in by_tensor.items():
        for layer in holders[key] if len(names) > 1 else ():
            shared.setdefault(layer, set()).update(names)
    return shared


def irregular_layers(modules: dict[str, nn.Module], shared: dict[str, set[str]]) -> set[str]:
    """Layers whose weight, or a norm's shift, is computed, or shared with what is no layer."""
    found: set[str] = set()
    for name, module in modules.items():
        if not is_layer(module):
            continue
        computed = (
            parametrize.is_parametrized(module)
            if is_norm(module)
            else module._parameters.get("weight") is None
        )
        if computed or not all(is_layer(modules[other]) for other in shared.get(name, ())):
            found.add(name)
    return found


def overlaid_layers(modules: dict[str, nn.Module]) -> set[str]:
    """Layers with a parameter that is in the same memory as another one.

    This is so after ``a.weight.data = b.weight.data``. To set one to zero changes the other.
    """
    places: dict[int, set[int]] = {}
    for module in modules.values():
        for parameter in module._parameters.values():
            if type(parameter) is nn.Parameter and parameter.numel():
                places.setdefault(parameter.data_ptr(), set()).add(id(parameter))
    overlaid = {one for place, ids in places.items() if place and len(ids) > 1 for one in ids}
    return {
        name
        for name, module in modules.items()
        if is_layer(module) and any(id(p) in overlaid for p in module._parameters.values())
    }
