"""Which optimizers are accepted, and what their state becomes."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from repr_det.errors import UserError
from repr_det.method.layers import FilterLayer

SECOND_MOMENTS = {
    "exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "acc_delta", "step_size"
}  # fmt: skip
"""Optimizer state that scales a step: a new filter starts with the survivors' mean of it."""

_ELEMENTWISE = tuple(
    getattr(torch.optim, name)
    for name in (
        "SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop",
        "Rprop", "ASGD",
    )
)  # fmt: skip


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer that cannot be held filter by filter.

    torch's elementwise optimizers and their subclasses pass. Any other is tried out: how one filter
    moves must not depend on the others.

    Raises:
        UserError: the optimizer is not elementwise, or could not be tried out.
    """
    if isinstance(optimizer, _ELEMENTWISE) or _is_elementwise(optimizer):
        return
    raise UserError(
        f"RePr cannot hold the state of {type(optimizer).__name__} filter by filter, so the "
        f"sub-network would not be exact; use an elementwise optimizer such as SGD, Adam, AdamW "
        f"or RMSprop."
    )


def _is_elementwise(optimizer: Optimizer) -> bool:
    accepted = inspect.signature(type(optimizer).__init__).parameters
    options = {k: v for k, v in optimizer.defaults.items() if k in accepted}
    generator = torch.Generator().manual_seed(0)
    values, gradients = (
        [torch.randn(6, 4, 3, 3, generator=generator) for _ in range(n)] for n in (1, 3)
    )
    parts = []
    try:
        for rows in (slice(None), slice(0, 3)):
            parameter = nn.Parameter(values[0][rows].clone())
            trial = type(optimizer)([parameter], **options)
            for gradient in gradients:
                parameter.grad = gradient[rows].clone()
                trial.step()
            parts.append(parameter.detach()[:3])
    except Exception:  # what a foreign optimizer raises is a no as well
        return False
    return torch.equal(*parts)


def state_tensors(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """An optimizer's state of a parameter that has the parameter's shape, by name."""
    state = optimizer.state.get(parameter, {})
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0
    }


def reset_state(layer: FilterLayer, returned: Tensor, optimizer: Optimizer) -> None:
    """Give returned filters (bool of shape (J,)) a fresh optimizer state.

    First moments start at zero. Second moments (:data:`SECOND_MOMENTS`) start at the mean of the
    survivors' in the layer: at zero, late in training, Adam's first steps of a new filter would be
    several times its neighbours'.
    """
    survivors = ~returned
    for key, state in state_tensors(optimizer, layer.weight).items():
        if key in SECOND_MOMENTS and survivors.any():
            rows = layer.matrix(state)
            mean = rows[survivors.to(rows.device)].mean(dim=0)
            layer.write_rows(returned, mean.expand(int(returned.sum()), -1), state)
        else:
            for slot in layer.weight_slots(returned):
                slot.fill(0.0, like=state)
    for slot, others in zip(
        layer.affine_slots(returned), layer.affine_slots(survivors), strict=True
    ):
        for key, state in state_tensors(optimizer, slot.tensor).items():
            of_others = others.read(like=state)
            scales = key in SECOND_MOMENTS and len(of_others)
            slot.fill(float(of_others.mean()) if scales else 0.0, like=state)
