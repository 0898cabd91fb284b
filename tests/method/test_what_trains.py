"""What trains is asked at each drop: frozen layers, other optimizers, later parameter groups."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from repr_det import RePr, RePrSchedule
from repr_det.errors import UserError
from tests.method.mixing import Centralised, OfTheGroup
from tests.method.nets import batch, check_held, loss

S1, S2 = 2, 3
SCHEDULE = RePrSchedule(S1, S2, 3)


def net(norm: bool = True) -> nn.Sequential:
    """Layers 3 and 6 can lose filters; 8 reads those of 6."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(8) if norm else nn.Identity() for _ in range(2)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Identity(),
        nn.Conv2d(8, 8, 3, padding=1), norms[0], nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.Sequential(norms[1], nn.SiLU(), nn.AdaptiveAvgPool2d(1)),
        nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-2)


def train(model, index, *optimizers):
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss(model, batch(index, torch.float32)).backward()
    for optimizer in optimizers:
        optimizer.step()


def without(model: nn.Module, *modules: nn.Module) -> list[nn.Parameter]:
    others = {p for module in modules for p in module.parameters()}
    return [p for p in model.parameters() if p not in others]


# --- other optimizers


def test_filters_that_another_optimizer_reads_stay():
    """Its momentum and weight decay, unknown here, would move the weights that read them."""
    model = net()
    head = sgd(model[9].parameters())
    trainer = sgd(without(model, model[9]))
    for i in range(2):
        train(model, i, trainer, head)
    with pytest.warns(UserWarning, match="6 cannot lose .* does not train 9, which requires grad"):
        method = RePr(model, trainer, SCHEDULE, 0.4)
    assert method.pruned.keys() == {"3"}
    for i in range(S1 + S2):
        method.step(i)
        train(model, i, trainer, head)
    check_held(method)
    # All that reads it is in the optimizer, so it is zero.
    assert not model[6].weight[:, method.pruned["3"]].any()


@pytest.mark.parametrize("part", ["bias", "gamma", "beta"])
def test_layers_of_which_another_optimizer_trains_a_part_stay(part):
    model = net()
    tensor = {"bias": model[3].bias, "gamma": model[4].weight, "beta": model[4].bias}[part]
    trainer = sgd([p for p in model.parameters() if p is not tensor])
    with pytest.warns(UserWarning, match="3 cannot lose filters") as warned:
        method = RePr(model, trainer, SCHEDULE, 0.4)
    assert warned[0].filename == __file__  # where RePr was made
    assert method.pruned.keys() == {"6"}
    tensor.requires_grad_(False)
    assert RePr(model, trainer, SCHEDULE, 0.4).pruned.keys() == {"3", "6"}


def test_nothing_is_left_without_what_another_optimizer_trains():
    model = net()
    trainer = sgd(without(model, model[9]))
    with pytest.raises(
        UserError, match="6 cannot lose filters.*Add it to the optimizer, or freeze"
    ):
        RePr(model, trainer, SCHEDULE, 0.4, include=["6"])


# --- freezing


def test_a_layer_frozen_after_set_up_loses_nothing():
    model = net()
    trainer = sgd(model.parameters())
    method = RePr(model, trainer, SCHEDULE, 0.4)
    model[3].requires_grad_(False)
    kept = model[3].weight.clone()
    for i in range(S1 + S2 + 1):
        method.step(i)
        assert "3" not in method.pruned or i < S1
        train(model, i, trainer)
    assert torch.equal(model[3].weight, kept)
    model[3].requires_grad_(True)
    for i in range(S1 + S2 + 1, 2 * S1 + S2 + 1):
        train(model, i, trainer)
        method.step(i)
    assert method.pruned["3"].any()


def test_a_layer_unfrozen_after_set_up_loses_filters():
    model = net()
    model[3].requires_grad_(False)
    trainer = sgd(model.parameters())
    method = RePr(model, trainer, SCHEDULE, 0.4)
    assert method.pruned.keys() == {"6"}
    model[3].requires_grad_(True)
    method.step(S1)
    assert method.pruned["3"].any()
    check_held(method)


def test_a_layer_passed_to_the_optimizer_later_loses_filters():
    model = net()
    model[3].requires_grad_(False)
    trainer = sgd(without(model, model[3]))
    method = RePr(model, trainer, SCHEDULE, 0.4)
    model[3].requires_grad_(True)
    trainer.add_param_group({"params": list(model[3].parameters())})
    for i in range(S1, S1 + S2):
        method.step(i)
        train(model, i, trainer)
        check_held(method)
    assert method.pruned["3"].any()


def test_a_group_added_later_is_tried_at_the_drop():
    model = net()
    trainer = OfTheGroup(without(model, model[3]))
    model[3].requires_grad_(False)
    method = RePr(model, trainer, SCHEDULE, 0.4)
    trainer.add_param_group({"params": list(model[3].parameters()), "central": True})
    with pytest.raises(UserError, match="with OfTheGroup the pruned network"):
        method.step(S1)
    assert method.phase == "full"


def test_a_layer_frozen_while_pruned_returns_as_it_was():
    """It could not learn new filters."""
    model = net()
    trainer = sgd(model.parameters())
    method = RePr(model, trainer, SCHEDULE, 0.4)
    for i in range(S1):
        train(model, i, trainer)
    before = copy.deepcopy(model[3].state_dict())
    method.step(S1)
    pruned = method.pruned["3"]
    assert pruned.any()
    model[3].requires_grad_(False)
    train(model, S1, trainer)
    check_held(method)
    method.step(S1 + S2)
    for key, value in model[3].state_dict().items():
        assert torch.equal(value[pruned], before[key][pruned])


def test_a_reader_frozen_at_the_drop_keeps_its_weights_when_it_is_unfrozen():
    model = net()
    trainer = sgd(model.parameters())
    method = RePr(model, trainer, SCHEDULE, 0.4)
    model[9].requires_grad_(False)
    before = model[9].weight.clone()
    method.step(S1)
    pruned = method.pruned["6"]
    assert pruned.any() and not model[9].weight[:, pruned].any()
    model[9].requires_grad_(True)
    train(model, S1, trainer)
    method.step(S1 + S2)
    assert torch.equal(model[9].weight[:, pruned], before[:, pruned])


@pytest.mark.parametrize("frozen_before_resume", [False, True])
@pytest.mark.parametrize("stop", [S1 + 1, S1 + S2])
def test_a_run_that_froze_a_layer_resumes(stop, frozen_before_resume):
    """With the same bits, whether the loop freezes it before or after RePr is set up."""

    def start(frozen: bool):
        model = net()
        model[3].requires_grad_(not frozen)
        trainer = sgd(model.parameters())
        return model, trainer, RePr(model, trainer, SCHEDULE, 0.4)

    def go_on(model, trainer, method, begin, end):
        for i in range(begin, end):
            model[3].requires_grad_(i < 1)
            method.step(i)
            train(model, i, trainer)

    end = 2 * (S1 + S2) + 1
    straight = start(False)
    go_on(*straight, 0, end)
    model, trainer, method = start(False)
    go_on(model, trainer, method, 0, stop)
    state = copy.deepcopy([model.state_dict(), trainer.state_dict(), method.state_dict()])
    resumed = start(frozen_before_resume)
    for target, part in zip(resumed, state, strict=True):
        target.load_state_dict(part)
    go_on(*resumed, stop, end)
    for (name, a), b in zip(
        straight[0].state_dict().items(), resumed[0].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert str(resumed[2].state_dict()["history"]) == str(straight[2].state_dict()["history"])


# --- the reason why no layer takes part


def scored(model: nn.Module, trainer=None, **arguments):
    return RePr(model, trainer or sgd(model.parameters()), SCHEDULE, 0.4, **arguments)


def test_each_reason_why_no_layer_takes_part():
    patches = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(32, 5))
    with pytest.raises(UserError, match="of the 1 conv layers, all read the image, predict"):
        scored(patches)
    model = net().requires_grad_(False)
    model[9].requires_grad_(True)
    with pytest.raises(UserError, match="the 2 that match are frozen. Unfreeze some"):
        scored(model)
    model = net()
    with pytest.raises(UserError, match="none is in the optimizer. Add their weights to it"):
        scored(model, sgd(model[9].parameters()))
    model = net()
    for index in (3, 6):
        nn.utils.parametrizations.weight_norm(model[index])
    with pytest.raises(UserError, match="weight of 3 is computed .*Remove the parametrization"):
        scored(model)


def test_centralised_gradients_are_refused_at_set_up():
    model = net()
    with pytest.raises(UserError, match="with Centralised the pruned network"):
        scored(model, Centralised(model.parameters(), 0.1))


def test_nothing_is_warned_of_where_one_optimizer_trains_all():
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scored(model)
