"""A pruned network and the physically smaller one, trained next to each other."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from repr_det import RePr, RePrSchedule
from tests.method import nets
from tests.method.smaller import cuts, full_weights, smaller

STEPS = 50
TOLERANCE = {torch.float64: 3e-14, torch.float32: 6e-7}
"""Ten times the largest difference measured: rounding, amplified over 50 steps."""


def clip_by_norm(model: nn.Module) -> None:
    # Detectron2 clips parameter by parameter.
    for parameter in model.parameters():
        nn.utils.clip_grad_norm_(parameter, 0.05)


def clip_all_by_norm(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def clip_by_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


def train_step(model, optimizer, index, dtype, clip=None, loss=nets.loss, batch=nets.batch):
    optimizer.zero_grad()
    value = loss(model, batch(index, dtype))
    value.backward()
    if clip is not None:
        clip(model)
    optimizer.step()
    return value.item()


def side_by_side(
    name, optimizer, dtype, clip=None, warm_up=3, net=nets.net, loss=nets.loss, batch=nets.batch
):
    """The pruned network and the smaller one, trained on the same batches.

    ``optimizer`` is a name of ``nets.OPTIMIZERS`` or builds one from parameters. Returns both
    networks, the losses of each, and the method.
    """
    build = nets.OPTIMIZERS.get(optimizer, optimizer)
    step = partial(train_step, dtype=dtype, clip=clip, loss=loss, batch=batch)
    model = net(name, dtype)
    trainer = build(model.parameters())
    method = RePr(
        model,
        trainer,
        RePrSchedule(warm_up, STEPS, 1),
        0.3,
        batches=lambda: iter([batch(0, dtype)]),
        loss=loss,
    )
    for i in range(warm_up):
        method.step(i)
        step(model, trainer, i)
    assert method.step(warm_up)[0].kind == "drop"
    assert method.num_pruned > 0

    reference = smaller(model, lambda m: m(batch(0, dtype)[0]))
    state = _state_of_kept(model, trainer, reference)
    reference_trainer = build(list(state))
    for parameter, values in state.items():
        reference_trainer.state[parameter].update(values)
    losses = [], []
    for i in range(warm_up, warm_up + STEPS):
        method.step(i)
        losses[0].append(step(model, trainer, i))
        losses[1].append(step(reference, reference_trainer, i))
    return model, reference, losses, method


def _state_of_kept(model, trainer, reference):
    """The optimizer state of the smaller network's parameters, cut out of the full network's."""
    full = dict(model.named_parameters())
    result = {}
    for name, module in reference.named_modules():
        for key, parameter, take in cuts(module):
            result[parameter] = {
                entry: take(value).clone() if value.dim() else value.clone()
                for entry, value in trainer.state.get(full[f"{name}.{key}"], {}).items()
                if isinstance(value, torch.Tensor)
            }
    return result


def assert_same(model, reference, losses):
    mine = dict(model.named_parameters())
    tolerance = TOLERANCE[next(model.parameters()).dtype]
    torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=tolerance)
    for name, expected in full_weights(reference).items():
        torch.testing.assert_close(
            mine[name].detach(),
            expected,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )
