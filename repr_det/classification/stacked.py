"""Several networks of one architecture as one module that runs them side by side.

On a GPU a small network's step is bound by the launches of its kernels, not by arithmetic; K
networks that are run by one launch take little longer than one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer


class StackedNetworks(nn.Module):
    """K networks whose parameters and buffers lie in tensors of shape ``(K, ...)``.

    The networks stay what they are, on storage that is part of the stack: what is written to one
    is written to the other. :meth:`forward` runs all of them under ``torch.vmap``: convolutions
    become grouped ones, and each BatchNorm its own network's.

    Args:
        networks: of one architecture, on one device.

    Attributes:
        stack: the networks' architecture with the stacked tensors, for optimizers to train; not to
            be called.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stack = copy.deepcopy(networks[0])
        self._networks = list(networks)  # a plain list: their tensors are no further parameters
        for name, parameter in networks[0].named_parameters():
            own = [network.get_parameter(name) for network in networks]
            stacked = nn.Parameter(
                torch.stack([p.detach() for p in own]), requires_grad=parameter.requires_grad
            )
            module, attribute = _owner(self.stack, name)
            setattr(module, attribute, stacked)
            for k, p in enumerate(own):
                p.data = stacked.detach()[k]
        for name, _ in networks[0].named_buffers():
            stacked = torch.stack([network.get_buffer(name) for network in networks])
            for k, network in enumerate([self.stack, *networks], -1):
                module, attribute = _owner(network, name)
                setattr(module, attribute, stacked if k < 0 else stacked[k])
        self._parameters_of = dict(self.stack.named_parameters())
        self._buffers_of = dict(self.stack.named_buffers())

    def forward(self, images: Tensor) -> Tensor:
        """Run every network.

        Args:
            images: ``(B, K, 3, H, W)``, or ``(B, 3, H, W)`` for all networks to see the same ones.
                The second dimension, so that the channels of all networks already lie side by
                side, which is what grouped convolutions read.

        Returns:
            ``(K, B, C)``.
        """
        run = torch.vmap(
            lambda parameters, buffers, images: functional_call(
                self.stack, (parameters, buffers), (images,)
            ),
            in_dims=(0, 0, 1 if images.dim() > 4 else None),
        )
        return run(self._parameters_of, self._buffers_of, images)

    def share_state(self, optimizer: Optimizer, optimizers: Sequence[Optimizer]) -> None:
        """Give each network's optimizer its part of the state of the one that trains the stack.

        To be called again when the state has come to be or was replaced; what is written to a part
        is written to the whole.

        Args:
            optimizer: of the stacked parameters.
            optimizers: one of each network's parameters.
        """
        for name, stacked in self._parameters_of.items():
            state = optimizer.state.get(stacked, {})
            for k, (network, own) in enumerate(zip(self._networks, optimizers, strict=True)):
                own.state[network.get_parameter(name)] = {
                    key: value[k]
                    if isinstance(value, Tensor) and value.shape == stacked.shape
                    else value
                    for key, value in state.items()
                }

    def separate(self, optimizers: Sequence[Optimizer]) -> None:
        """Give each network and its optimizer memory of their own: the end of the sharing.

        Args:
            optimizers: one of each network's parameters, after :meth:`share_state`.
        """
        for network, optimizer in zip(self._networks, optimizers, strict=True):
            for parameter in network.parameters():
                parameter.data = parameter.detach().clone()
            for name, buffer in network.named_buffers():
                module, attribute = _owner(network, name)
                setattr(module, attribute, buffer.clone())
            for state in optimizer.state.values():
                state.update(
                    {
                        key: value.clone()
                        for key, value in state.items()
                        if isinstance(value, Tensor)
                    }
                )


def _owner(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor of a dotted name, and the tensor's name in it."""
    module, _, attribute = name.rpartition(".")
    return network.get_submodule(module), attribute
