"""Filters that return as they were: ``Reinit(direction="previous")``."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from repr_det import Reinit, RePr, RePrSchedule
from repr_det.method.compact import Compact
from tests.grids import covering
from tests.method.nets import NETS, OPTIMIZERS, batch, loss, net

SCHEDULE = RePrSchedule(s1=3, s2=4, cycles=1)
PREVIOUS = Reinit(direction="previous")


def endless():
    i = 500
    while True:
        yield batch(i, torch.float32)
        i += 1


def train(model, trainer, index):
    trainer.zero_grad()
    loss(model, batch(index, torch.float32)).backward()
    trainer.step()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights, and statistics of frozen norms."""
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d):
            found |= {f"{name}.{key}": value.clone() for key, value in module.named_buffers()}
    return found


def start(name, optimizer="momentum", **arguments):
    model = net(name, torch.float32)
    trainer = OPTIMIZERS[optimizer](model.parameters())
    arguments = {"reinit": PREVIOUS, "batches": endless, "loss": loss} | arguments
    method = RePr(model, trainer, SCHEDULE, **arguments)
    for i in range(SCHEDULE.s1):
        method.step(i)
        train(model, trainer, i)
    return model, trainer, method


def assert_bits(mine, expected):
    assert mine.keys() == expected.keys()
    for name in expected:
        assert torch.equal(mine[name], expected[name]), name


@pytest.mark.parametrize(
    ("name", "optimizer", "form"), covering(NETS, OPTIMIZERS, ["masked", "compact"])
)
def test_without_learning_in_s2_nothing_was_dropped(name, optimizer, form):
    model, trainer, method = start(name, optimizer)
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.9)
    method = RePr(
        model, trainer, SCHEDULE, batches=endless, loss=loss, copies=[average], reinit=PREVIOUS
    )
    before, averaged = values(model), values(average)
    smaller = Compact(method)
    rates = [group["lr"] for group in trainer.param_groups]
    for group in trainer.param_groups:
        group["lr"] = 0.0
    for i in range(SCHEDULE.s1, SCHEDULE.end):
        method.step(i)
        if not smaller.active:
            check_pruned(method)
            if form == "compact":
                smaller.shrink()
        train(model, trainer, i)
    smaller.grow()
    method.step(SCHEDULE.end)
    assert_bits(values(model), before)
    assert_bits(values(average), averaged)
    for group, rate in zip(trainer.param_groups, rates, strict=True):
        group["lr"] = rate
    train(model, trainer, SCHEDULE.end)
    assert all((layer.matrix().norm(dim=1) > 0).all() for layer in method.layers)


def check_pruned(method):
    assert method.num_pruned > 0
    for layer in method.layers:
        assert not any(slot.read().any() for slot in layer.filter_slots(method.pruned[layer.name]))


@pytest.mark.parametrize("name", NETS)
def test_only_pruned_filters_return_while_survivors_learn(name):
    model, trainer, method = start(name, "adam")
    before = copy.deepcopy(model)
    statistics = dict(before.named_buffers())
    for i in range(SCHEDULE.s1, SCHEDULE.end):
        method.step(i)
        train(model, trainer, i)
    pruned = method.pruned
    method.step(SCHEDULE.end)
    for layer in method.layers:
        mask = pruned[layer.name]
        old = layer.matrix(before.get_submodule(layer.name).weight)
        assert torch.equal(layer.matrix()[mask], old[mask])
        assert not torch.equal(layer.matrix()[~mask], old[~mask])
        for link in layer.norms:
            channels = link.channels_of(mask)
            theirs = before.get_submodule(link.name)
            for key in ("weight", "bias"):
                if getattr(theirs, key) is not None:
                    mine = getattr(link.module, key)
                    assert torch.equal(mine[channels], getattr(theirs, key)[channels])
            for key in ("running_mean", "running_var"):
                mine = dict(model.named_buffers())[f"{link.name}.{key}"]
                assert torch.equal(mine[channels], statistics[f"{link.name}.{key}"][channels])


def test_optimizer_state_is_reset():
    """First moments are zero, of what reads a filter too; second moments are kept or averaged."""
    model, trainer, method = start("chain", "adam")
    linear, conv = model[-1], model[7]
    second = trainer.state[linear.weight]["exp_avg_sq"].clone()
    for i in range(SCHEDULE.s1, SCHEDULE.end):
        method.step(i)
        train(model, trainer, i)
    mask = method.pruned["7"]
    assert mask.any()
    features = mask.repeat_interleave(4)
    method.step(SCHEDULE.end)
    state, read = trainer.state[conv.weight], trainer.state[linear.weight]
    assert not state["exp_avg"][mask].any() and state["exp_avg"][~mask].any()
    mean = state["exp_avg_sq"][~mask].mean(dim=0)
    torch.testing.assert_close(state["exp_avg_sq"][mask], mean.expand_as(state["exp_avg_sq"][mask]))
    assert not read["exp_avg"][:, features].any() and read["exp_avg"][:, ~features].any()
    assert torch.equal(read["exp_avg_sq"][:, features], second[:, features])


def test_frozen_norms_need_no_batches():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, _, method = start("chain-frozen", batches=None, loss=None)
    method.step(SCHEDULE.s1)
    check_pruned(method)


@pytest.mark.parametrize(
    "field", [{"norm": "previous"}, {"scale": 0.5}, {"gamma": "one"}, {"beta": "survivors"},
              {"outgoing": 1.0}],
)  # fmt: skip
def test_fields_that_do_not_apply_are_refused(field):
    ((name, value),) = field.items()
    told = f"{name} is {value!r}, but with direction 'previous' filters return as they were"
    with pytest.raises(ValueError, match=re.escape(told)):
        Reinit(direction="previous", **field)


def test_unknown_directions_are_refused():
    with pytest.raises(ValueError, match="direction is 'random'. Set one of orthogonal, previous"):
        Reinit(direction="random")


def test_states_that_do_not_mention_the_direction_are_orthogonal():
    _, _, method = start("chain", reinit=None)
    state = method.state_dict()
    del state["settings"]["reinit.direction"], state["before_in_copies"]
    start("chain", reinit=None)[2].load_state_dict(state)
    with pytest.raises(ValueError, match="reinit.direction was 'orthogonal', is 'previous'"):
        start("chain")[2].load_state_dict(state)
