"""A reference: the physically smaller network, found by looking at numbers alone.

Knows nothing of how the method finds norms and readers: a norm channel is gone where gamma and
beta are zero (without them, where what it reads is), a filter where its weight row is, and an input
column where the channel is zero for every input with ReLU taken off (which makes channels zero by
chance).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor, nn


def _scatter(y: Tensor, keep: Tensor, dim: int = 1) -> Tensor:
    shape = list(y.shape)
    shape[dim] = len(keep)
    return y.new_zeros(shape).index_copy(dim, keep.nonzero().flatten(), y)


class SmallerConv(nn.Module):
    """A conv without the removed rows and columns; removed outputs are filled up with zeros."""

    def __init__(self, conv: nn.Module, keep_out: Tensor, keep_in: Tensor) -> None:
        super().__init__()
        self.conv, self.keep_out, self.keep_in = conv, keep_out, keep_in
        weight = conv.weight.detach()
        self.transposed = isinstance(conv, nn.ConvTranspose2d)
        if self.transposed:
            assert conv.groups == 1
            self.weight = nn.Parameter(weight[keep_in][:, keep_out].clone())
        elif conv.groups == 1:
            self.weight = nn.Parameter(weight[keep_out][:, keep_in].clone())
        else:
            # Groups of unequal size have no conv of their own: one smaller conv a group.
            rows, columns = (k.reshape(conv.groups, -1) for k in (keep_out, keep_in))
            blocks = weight.reshape(conv.groups, -1, *weight.shape[1:])
            self.weight = nn.ParameterList(
                nn.Parameter(b[r][:, c].clone())
                for b, r, c in zip(blocks, rows, columns, strict=True)
            )
        self.bias = (
            None if conv.bias is None else nn.Parameter(conv.bias.detach()[keep_out].clone())
        )

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if self.transposed:
            y = nn.functional.conv_transpose2d(
                x[:, self.keep_in], self.weight, self.bias, conv.stride, conv.padding
            )
        elif conv.groups == 1:
            y = nn.functional.conv2d(
                x[:, self.keep_in], self.weight, self.bias, conv.stride, conv.padding
            )
        else:
            parts = x.chunk(conv.groups, 1)
            columns = self.keep_in.reshape(conv.groups, -1)
            y = torch.cat(
                [
                    nn.functional.conv2d(p[:, c], w, None, conv.stride, conv.padding)
                    for p, c, w in zip(parts, columns, self.weight, strict=True)
                    if len(w)
                ],
                dim=1,
            )
            if self.bias is not None:
                y = y + self.bias[:, None, None]
        return _scatter(y, self.keep_out)

    def full(self) -> Tensor:
        """The weight at the full network's shape, zeros where something was removed."""
        weight = torch.zeros_like(self.conv.weight)
        if self.transposed:
            weight[self.keep_in.nonzero(), self.keep_out.nonzero().T] = self.weight.detach()
        elif self.conv.groups == 1:
            weight[self.keep_out.nonzero(), self.keep_in.nonzero().T] = self.weight.detach()
        else:
            blocks = weight.reshape(self.conv.groups, -1, *weight.shape[1:])
            rows, columns = (k.reshape(self.conv.groups, -1) for k in (self.keep_out, self.keep_in))
            for b, r, c, w in zip(blocks, rows, columns, self.weight, strict=True):
                b[r.nonzero(), c.nonzero().T] = w.detach()
        return weight


class SmallerNorm(nn.Module):
    """A norm over the kept channels only."""

    def __init__(self, norm: nn.Module, keep: Tensor) -> None:
        super().__init__()
        self.keep = keep
        self.norm = copy.deepcopy(norm)
        for tensors in (self.norm._parameters, self.norm._buffers):
            for name, value in tensors.items():
                if value is not None and value.dim() == 1:
                    new = value.detach()[keep].clone()
                    is_parameter = isinstance(value, nn.Parameter)
                    tensors[name] = nn.Parameter(new) if is_parameter else new
        self.norm.num_features = int(keep.sum())

    def forward(self, x: Tensor) -> Tensor:
        return _scatter(self.norm(x[:, self.keep]), self.keep)


class SmallerLinear(nn.Module):
    """A linear layer without removed rows and columns; removed units are filled up with zeros."""

    def __init__(self, linear: nn.Linear, keep_out: Tensor, keep_in: Tensor) -> None:
        super().__init__()
        self.linear, self.keep_out, self.keep_in = linear, keep_out, keep_in
        self.weight = nn.Parameter(linear.weight.detach()[keep_out][:, keep_in].clone())
        self.bias = (
            None if linear.bias is None else nn.Parameter(linear.bias.detach()[keep_out].clone())
        )

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x[..., self.keep_in], self.weight, self.bias)
        return _scatter(y, self.keep_out, -1)

    def full(self) -> Tensor:
        weight = torch.zeros_like(self.linear.weight)
        weight[self.keep_out.nonzero(), self.keep_in.nonzero().T] = self.weight.detach()
        return weight


def smaller(model: nn.Module, run: Callable[[nn.Module], object]) -> nn.Module:
    """The physically smaller network of a pruned one.

    Args:
        model: a network in S2.
        run: runs a network on dense random inputs.
    """
    probe = copy.deepcopy(model)
    silent: dict[str, Tensor] = {}

    def record(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0].detach()
            channels = x.dim() - 1 if isinstance(module, nn.Linear) else 1
            axes = [d for d in range(x.dim()) if d != channels]
            silent[name] = silent.get(name, True) & (x.abs().amax(axes) == 0)

        return hook

    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d)
    for name, module in probe.named_modules():
        if isinstance(module, kinds):
            module.register_forward_pre_hook(record(name))
    identity = {"relu": lambda x, inplace=False: x, "relu_": lambda x: x}
    with torch.no_grad(), mock.patch.multiple(nn.functional, **identity):
        run(probe)

    result = copy.deepcopy(model)
    for name, module in list(result.named_modules()):
        new: nn.Module | None = None
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            weight = module.weight.detach()
            if isinstance(module, nn.ConvTranspose2d):
                weight = weight.transpose(0, 1)
            new = SmallerConv(module, weight.flatten(1).abs().amax(1) != 0, ~silent[name])
        elif (
            isinstance(module, nn.Linear) and name in silent
        ):  # else another module uses its weight
            new = SmallerLinear(module, module.weight.detach().abs().amax(1) != 0, ~silent[name])
        elif getattr(module, "running_mean", None) is not None:
            if module.weight is None:
                gone = silent[name]
            else:
                gone = (module.weight.detach() == 0) & (module.bias.detach() == 0)
            new = SmallerNorm(module, ~gone)
        if new is not None:
            parent = result.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], new)
    return result


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of a smaller network at the full network's shapes, by the full network's names."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, (SmallerConv, SmallerLinear)):
            weights[f"{name}.weight"] = module.full()
            if module.bias is not None:
                bias = module.bias.detach()
                weights[f"{name}.bias"] = _scatter(bias, module.keep_out, 0)
        elif isinstance(module, SmallerNorm):
            for key, value in module.norm.named_parameters():
                weights[f"{name}.{key}"] = _scatter(value.detach(), module.keep, 0)
    return weights


def cuts(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Callable[[Tensor], Tensor]]]:
    """Per parameter of a smaller layer: name, itself, and what cuts it out of the full tensor."""
    if isinstance(module, SmallerConv):
        rows, columns, groups = module.keep_out, module.keep_in, module.conv.groups
        if module.transposed:
            yield "weight", module.weight, lambda v: v[columns][:, rows]
        elif groups == 1:
            yield "weight", module.weight, lambda v: v[rows][:, columns]
        else:
            for g, parameter in enumerate(module.weight):
                r, c = rows.reshape(groups, -1)[g], columns.reshape(groups, -1)[g]
                yield (
                    "weight",
                    parameter,
                    lambda v, g=g, r=r, c=c: v.reshape(groups, -1, *v.shape[1:])[g][r][:, c],
                )
        if module.bias is not None:
            yield "bias", module.bias, lambda v: v[rows]
    elif isinstance(module, SmallerLinear):
        yield "weight", module.weight, lambda v: v[module.keep_out][:, module.keep_in]
        if module.bias is not None:
            yield "bias", module.bias, lambda v: v[module.keep_out]
    elif isinstance(module, SmallerNorm):
        for name, parameter in module.norm.named_parameters():
            yield name, parameter, lambda v: v[module.keep]
