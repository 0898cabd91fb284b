"""After: the rate of every step after a return, against rates set by hand."""

from __future__ import annotations

import copy

import pytest
import torch

from repr_det import RePr, RePrSchedule
from tests.method.nets import OPTIMIZERS, batch, loss, net

SCHEDULE = RePrSchedule(s1=3, s2=2, cycles=2)  # returns at 5 and 10
FACTORS = {5: 1 / 4, 6: 2 / 4, 7: 3 / 4, 10: 1 / 4, 11: 2 / 4, 12: 3 / 4}
LENGTH = 15


def built(kind, warmup):
    model = net("chain", torch.float32)
    optimizer = OPTIMIZERS[kind](model.parameters())
    return model, optimizer, RePr(model, optimizer, SCHEDULE, warmup=warmup)


def gradients(model, optimizer, index):
    optimizer.zero_grad()
    loss(model, batch(index, torch.float32)).backward()


def assert_same_weights(one, other):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_iterations_since_the_last_return():
    expected = [None] * 5 + [0, 1, 2, 3, 4] + [0, 1, 2, 3, 4, 5]
    assert [SCHEDULE.since_return(i) for i in range(16)] == expected


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_steps_are_those_of_rates_set_by_hand(kind):
    model, optimizer, method = built(kind, 3)
    by_hand, its_optimizer, its_method = built(kind, 0)
    rate = optimizer.param_groups[0]["lr"]
    for i in range(LENGTH):
        method.step(i)
        gradients(model, optimizer, i)
        optimizer.step()
        assert [group["lr"] for group in optimizer.param_groups] == [rate]
        its_method.step(i)
        gradients(by_hand, its_optimizer, i)
        its_optimizer.param_groups[0]["lr"] = FACTORS.get(i, 1) * rate
        its_optimizer.step()
        assert_same_weights(model, by_hand)


def test_a_scheduler_does_not_notice():
    """Chained schedulers compute a rate from the last one, so it must be back in time."""
    _, optimizer, method = built("momentum", 3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rate = optimizer.param_groups[0]["lr"]
    for i in range(LENGTH):
        method.step(i)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == rate * 0.5**LENGTH


def test_goes_on_in_the_middle():
    model, optimizer, method = built("adam", 3)
    resumed, its_optimizer, its_method = built("adam", 3)
    for i in range(LENGTH):
        if i == 6:
            resumed.load_state_dict(model.state_dict())
            its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            its_method.load_state_dict(method.state_dict())
        for m, o, r in ((model, optimizer, method), (resumed, its_optimizer, its_method)):
            if m is model or i >= 6:
                r.step(i)
                gradients(m, o, i)
                o.step()
    assert_same_weights(model, resumed)


def test_state_of_another_warmup_is_refused():
    _, _, method = built("adam", 3)
    _, _, other = built("adam", 2)
    with pytest.raises(ValueError, match="warmup was 3, is 2"):
        other.load_state_dict(method.state_dict())


@pytest.mark.parametrize("value", [-1, 4, 1.0, True, "2"])
def test_refuses_what_is_no_length_up_to_s1(value):
    with pytest.raises(ValueError, match=f"warmup is {value!r}.* 0 to S1, which is 3"):
        built("adam", value)


@pytest.mark.parametrize("kind", [torch.optim.Rprop, torch.optim.ASGD])
def test_refuses_optimizers_whose_steps_do_not_follow_the_rate(kind):
    model = net("chain", torch.float32)
    with pytest.raises(ValueError, match=f"steps of {kind.__name__} do not follow"):
        RePr(model, kind(model.parameters()), SCHEDULE, warmup=1)


def test_refuses_to_end_in_a_warmup():
    SCHEDULE.check_fits(13, warmup=3)
    with pytest.raises(ValueError, match="ends after 12 iterations, in the warm-up of 3 .* at 10"):
        SCHEDULE.check_fits(12, warmup=3)


def test_a_step_that_was_not_announced_has_the_whole_rate():
    """An interrupted run, say, whose optimizer is used for another."""
    model, optimizer, method = built("momentum", 3)
    rates = []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    rate = optimizer.param_groups[0]["lr"]
    method.step(5)
    optimizer.step()
    optimizer.step()
    assert rates == [rate / 4, rate]


def test_a_step_that_fails_does_not_lower_the_next():
    model, optimizer, method = built("momentum", 3)
    rate = optimizer.param_groups[0]["lr"]
    method.step(5)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    method.step(8)
    assert optimizer.param_groups[0]["lr"] == rate
