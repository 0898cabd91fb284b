"""Optimizers that mix filters, which RePr refuses."""

from __future__ import annotations

import torch


class OnEach(torch.optim.Optimizer):
    """An optimizer that changes one tensor after another, without a state unless it sets one."""

    def __init__(self, params, lr: float = 0.1, **options) -> None:
        super().__init__(params, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, self.state[p], group)

    def update(self, p, state, group) -> None:
        raise NotImplementedError


class OfTheGroup(OnEach):
    """An option that only some groups have."""

    def update(self, p, state, group):
        gradient = p.grad - p.grad.mean() if group.get("central") else p.grad
        p.sub_(group["lr"] * gradient)


class Centralised(torch.optim.SGD):
    """A subclass of an accepted class; looks at rows alone, so rows do not show it."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() > 1:
                    p.grad.sub_(p.grad.flatten(1).mean(1).reshape(-1, *[1] * (p.dim() - 1)))
        super().step(closure)
