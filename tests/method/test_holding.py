"""Every pruned filter is held at zero, whatever reads it and however its gradient arrives."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from repr_det import RePr, RePrSchedule
from repr_det.method.holding import GradientMask, moved
from repr_det.method.layers import Slot
from tests.method.nets import OPTIMIZERS, batch, check_held, loss, net


def body(kind: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    """Two convs with an activation whose slope at zero is not zero: nothing hides a missing hold.

    The norm in front of the pool is read by more than one layer in the nets below.
    """
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), kind(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), kind(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class Rare(nn.Module):
    """A second head, which only every other batch reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.rare = body(), nn.Linear(8, 5), nn.Linear(8, 5)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        self.calls += self.training
        scores = self.head(features)
        return scores + self.rare(features) if self.calls > 3 and self.calls % 2 else scores


def pruned_half(model: nn.Module, optimizer: str = "momentum"):
    trainer = OPTIMIZERS[optimizer](model.parameters())
    method = RePr(model, trainer, RePrSchedule(1, 99, 1), 0.5)
    method.step(1)
    return method, trainer


def simple() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*body(), nn.Linear(8, 5))


def gradients(model: nn.Module, index: int) -> tuple[Tensor, ...]:
    value = loss(model, batch(index, torch.float32))
    return torch.autograd.grad(value, list(model.parameters()))


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_branch_that_only_some_batches_reach(optimizer):
    torch.manual_seed(0)
    model = Rare()
    method, trainer = pruned_half(model, optimizer)
    for i in range(9):
        method.step(i + 1)
        trainer.zero_grad()
        loss(model, batch(i, torch.float32)).backward()
        trainer.step()
        check_held(method)
    assert model.rare.weight.grad.any()


def by_assignment(model: nn.Module, index: int) -> None:
    for parameter, gradient in zip(model.parameters(), gradients(model, index), strict=True):
        parameter.grad = gradient + 1


def in_place(model: nn.Module, index: int) -> None:
    for parameter, gradient in zip(model.parameters(), gradients(model, index), strict=True):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.copy_(gradient + 1)


def noise_after_backward(model: nn.Module, index: int) -> None:
    loss(model, batch(index, torch.float32)).backward()
    for parameter in model.parameters():
        parameter.grad.add_(torch.randn_like(parameter))


def replaced_after_backward(model: nn.Module, index: int) -> None:
    loss(model, batch(index, torch.float32)).backward()
    for parameter in model.parameters():
        parameter.grad = torch.nn.functional.normalize(parameter.grad, dim=0) + 1


def of_two_batches(model: nn.Module, index: int) -> None:
    for part in range(2):
        (loss(model, batch(index + part, torch.float32)) + penalty(model)).backward()


def penalty(model: nn.Module) -> Tensor:
    return sum((p - 0.1).square().sum() for p in model.parameters())


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    "write",
    [
        by_assignment, in_place, noise_after_backward, replaced_after_backward, of_two_batches,
    ],
)  # fmt: skip
def test_gradients_written_in_any_way_do_not_arrive(write: Callable, keep: bool):
    model = simple()
    method, trainer = pruned_half(model)
    for i in range(4):
        method.step(i + 1)
        trainer.zero_grad(set_to_none=not keep)
        write(model, i)
        trainer.step()
        check_held(method)


def test_hooks_that_write_after_ours():
    model = simple()
    method, trainer = pruned_half(model)

    def write(parameter: Tensor) -> None:
        parameter.grad.add_(1)

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(write)
    for i in range(3):
        trainer.zero_grad()
        loss(model, batch(i, torch.float32)).backward()
        trainer.step()
        check_held(method)


def test_closure_that_runs_backward_within_the_step():
    model = simple()
    method, trainer = pruned_half(model)

    def closure() -> Tensor:
        trainer.zero_grad()
        value = loss(model, batch(0, torch.float32)) + penalty(model)
        value.backward()
        return value

    for _ in range(3):
        trainer.step(closure)
        check_held(method)


def test_scaled_gradients_are_held():
    model = simple()
    method, trainer = pruned_half(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(3):
        trainer.zero_grad()
        scaler.scale(loss(model, batch(i, torch.float32)) + penalty(model)).backward()
        scaler.unscale_(trainer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(trainer)
        scaler.update()
        check_held(method)
    assert model[0].weight.grad.any()


def test_norm_that_is_unfrozen_while_its_filters_are_pruned():
    model = simple()
    model[3].requires_grad_(False)
    method, trainer = pruned_half(model)
    for i in range(4):
        model[3].requires_grad_(i > 0)
        trainer.zero_grad()
        (loss(model, batch(i, torch.float32)) + penalty(model)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert i == 0 or not model[3].bias.grad[method.pruned["2"]].any()
        trainer.step()
        check_held(method)
    assert not model[3].weight.detach().eq(1).any()


def test_data_that_is_replaced_stays_held():
    model = simple()
    method, trainer = pruned_half(model)
    for i in range(3):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        trainer.zero_grad()
        (loss(model, batch(i, torch.float32)) + penalty(model)).backward()
        trainer.step()
        check_held(method)


def test_a_gradient_that_was_held_is_not_written_again():
    """The look before the step costs nothing where only backward wrote the gradients."""
    model = simple()
    method, _ = pruned_half(model)
    loss(model, batch(0, torch.float32)).backward()
    versions = [p.grad._version for p in model.parameters()]
    method.mask_gradients()
    assert [p.grad._version for p in model.parameters()] == versions


def test_gradients_arrive_again_after_the_return():
    model = simple()
    trainer = OPTIMIZERS["momentum"](model.parameters())
    method = RePr(model, trainer, RePrSchedule(1, 2, 1), 0.5)
    method.step(1)
    pruned = method.pruned["2"]
    method.step(3)
    for write in (of_two_batches, by_assignment):
        trainer.zero_grad()
        write(model, 0)
        trainer.step()
        assert model[2].weight.grad[pruned].any()
    hooks = [
        *trainer._optimizer_step_pre_hooks,
        *(model[2].weight._post_accumulate_grad_hooks or ()),
    ]
    assert not hooks


@pytest.mark.parametrize("name", ["chain", "chain-bias", "residual-frozen", "residual-grouped"])
@pytest.mark.parametrize("value", [1e-30, -1.0, math.nan])
def test_any_part_of_a_filter_that_is_not_zero_shows(name, value):
    method, _ = pruned_half(net(name, torch.float32))
    for layer in method.layers:
        pruned = method.pruned[layer.name]
        for slot in layer.filter_slots(pruned) if pruned.any() else ():
            assert not moved(layer, pruned)
            slot.write(torch.full_like(slot.read(), value))
            assert moved(layer, pruned)
            slot.fill(0.0)


def write_to_the_weight(model: nn.Module, pruned: Tensor) -> None:
    with torch.no_grad():
        model[2].weight[pruned] += 1e-3


def write_past_autograd(model: nn.Module, pruned: Tensor) -> None:
    """Only what torch counts as a change of a gradient is seen before the step."""
    model[2].weight.grad.data.add_(1.0)


@pytest.mark.parametrize("write", [None, write_to_the_weight, write_past_autograd])
def test_filters_that_something_wrote_to_are_warned_of(write):
    model = simple()
    trainer = OPTIMIZERS["momentum"](model.parameters())
    method = RePr(model, trainer, RePrSchedule(1, 4, 1), 0.5)
    method.step(1)
    loss(model, batch(0, torch.float32)).backward()
    if write is not None:
        write(model, method.pruned["2"])
    trainer.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        method.step(5)
    messages = [str(one.message) for one in caught if "did not stay zero" in str(one.message)]
    assert len(messages) == (write is not None)
    assert write is None or ("of 2 did" in messages[0] and caught[0].filename == __file__)


def test_columns_that_moved_are_warned_of():
    """As where some batches add something to a pruned channel."""
    model = simple()
    method = RePr(
        model, OPTIMIZERS["momentum"](model.parameters()), RePrSchedule(1, 4, 1), 0.5, include=["2"]
    )
    method.step(1)
    model[3].register_forward_hook(lambda module, args, out: out + 1)
    loss(model, batch(0, torch.float32)).backward()
    method.optimizer.step()
    with pytest.warns(UserWarning, match="weights of .* that read dropped filters did not stay"):
        method.step(5)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_gradient_that_overflows_in_a_held_filter_is_zero(value):
    """So that it is neither clipped by nor a reason to skip a step with mixed precision."""
    bias = nn.Parameter(torch.ones(3))
    slots = [Slot(bias, None, 0, torch.tensor([0]))]
    mask = GradientMask(slots, torch.optim.SGD([bias], 0.1))
    (bias * torch.tensor([value, 1.0, 2.0])).sum().backward()
    assert bias.grad.tolist() == [0.0, 1.0, 2.0]
    mask.remove()


def test_a_copy_of_a_pruned_model_is_not_held():
    model = simple()
    pruned_half(model)
    other = copy.deepcopy(model)
    penalty(other).backward()
    assert other[2].weight.grad.ne(0).all()
