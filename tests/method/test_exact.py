"""Promise 1: the sub-network trains as the physically smaller network does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from repr_det import RePr, RePrSchedule
from tests.method.nets import NETS, OPTIMIZERS, batch, chain, loss, net
from tests.method.smaller import cuts, full_weights, smaller

STEPS = 50


def clip_by_norm(model: nn.Module) -> None:
    # Detectron2 clips parameter by parameter.
    for parameter in model.parameters():
        nn.utils.clip_grad_norm_(parameter, 0.05)


def clip_all_by_norm(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def clip_by_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


def train_step(model, optimizer, index, dtype, clip=None):
    optimizer.zero_grad()
    value = loss(model, batch(index, dtype))
    value.backward()
    if clip is not None:
        clip(model)
    optimizer.step()
    return value.item()


def side_by_side(name, optimizer, dtype, clip=None, warm_up=3):
    """The pruned network and the smaller one, trained on the same batches: networks and losses."""
    model = net(name, dtype)
    trainer = OPTIMIZERS[optimizer](model.parameters())
    method = RePr(
        model, trainer, RePrSchedule(warm_up, STEPS, 1), 0.3, batches=lambda: iter([]), loss=loss
    )
    for i in range(warm_up):
        method.step(i)
        train_step(model, trainer, i, dtype, clip)
    assert method.step(warm_up)[0].kind == "drop"
    assert method.num_pruned > 0

    reference = smaller(model, lambda m: m(batch(0, dtype)[0]))
    state = _state_of_kept(model, trainer, reference)
    reference_trainer = OPTIMIZERS[optimizer](list(state))
    for parameter, values in state.items():
        reference_trainer.state[parameter].update(values)
    losses = [], []
    for i in range(warm_up, warm_up + STEPS):
        method.step(i)
        losses[0].append(train_step(model, trainer, i, dtype, clip))
        losses[1].append(train_step(reference, reference_trainer, i, dtype, clip))
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


def assert_same(model, reference, losses, tolerance):
    torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=tolerance)
    mine = dict(model.named_parameters())
    for name, expected in full_weights(reference).items():
        torch.testing.assert_close(
            mine[name].detach(),
            expected,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETS)
def test_trains_as_the_smaller_network(name, optimizer):
    # float64 rounding, amplified over 50 steps: measured below 1e-11.
    model, reference, losses, _ = side_by_side(name, optimizer, torch.float64)
    assert_same(model, reference, losses, 1e-9)


@pytest.mark.parametrize("clip", [clip_by_norm, clip_all_by_norm, clip_by_value])
@pytest.mark.parametrize("name", ["chain", "residual", "residual-bias"])
def test_clipping_sees_the_smaller_network(name, clip):
    model, reference, losses, _ = side_by_side(name, "momentum", torch.float64, clip)
    assert_same(model, reference, losses, 1e-9)


@pytest.mark.parametrize("name", ["chain", "residual-bias"])
def test_float32(name):
    model, reference, losses, _ = side_by_side(name, "momentum", torch.float32)
    assert_same(model, reference, losses, 1e-3)


@pytest.mark.parametrize("name", [*NETS])
def test_output_after_the_norm_is_zero(name):
    """In training and evaluation mode, at the last place before filters are mixed."""
    model, _, _, method = side_by_side(name, "momentum", torch.float64)
    outputs = {}
    watched = {}
    for layer in method.layers:
        # The pre-activation net has norms behind every concatenation; its own test is the zero
        # of the conv, which is what those norms see.
        module = layer.norms[0].module if layer.norms and name != "dense" else layer.module
        watched[layer.name] = module
        module.register_forward_hook(
            lambda m, a, out, n=layer.name: outputs.__setitem__(n, out.detach().clone())
        )
    for training in (True, False):
        model.train(training)
        model(batch(0)[0])
        for layer_name, mask in method.pruned.items():
            assert outputs[layer_name][:, mask].abs().sum() == 0
            assert (outputs[layer_name][:, ~mask] != 0).any()


def test_regulariser_in_the_loss_does_not_wake_a_filter():
    """A loss on the weights themselves gives pruned rows a gradient; it must not arrive."""
    model = net("chain")
    trainer = OPTIMIZERS["adam"](model.parameters())
    method = RePr(model, trainer, RePrSchedule(1, 9, 1), 0.3)
    for i in range(10):
        method.step(i)
        trainer.zero_grad()
        penalty = sum((layer.module.weight - 0.1).square().sum() for layer in method.layers)
        (loss(model, batch(i)) + penalty).backward()
        trainer.step()
    for layer in method.layers:
        assert layer.weight[method.pruned[layer.name]].abs().sum() == 0


@pytest.mark.parametrize(
    ("make", "free"),
    [(NETS["chain"], True), (NETS["residual"], False), (lambda: chain("GN"), False)],
)
def test_only_filters_that_get_a_gradient_are_held(make, free):
    """Where all that reads a filter is known, its gradient is zero, and no hook costs time."""
    torch.manual_seed(0)
    model = make().double()
    trainer = OPTIMIZERS["momentum"](model.parameters())
    method = RePr(model, trainer, RePrSchedule(1, 9, 1), 0.3)
    for i in range(3):
        method.step(i)
        train_step(model, trainer, i, torch.float64)
    held = {layer.name for layer in method.layers if layer.weight._post_accumulate_grad_hooks}
    pruned = {layer.name for layer in method.layers if method.pruned[layer.name].any()}
    assert held <= pruned and pruned
    assert not held if free else held


def test_mask_gradients_serves_loops_without_backward():
    model = net("chain-bias")
    trainer = OPTIMIZERS["momentum"](model.parameters())
    method = RePr(model, trainer, RePrSchedule(1, 3, 1), 0.3)
    method.step(1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    method.mask_gradients()
    trainer.step()
    for layer in method.layers:
        mask = method.pruned[layer.name]
        assert layer.weight[mask].abs().sum() == 0
        assert layer.bias[mask].abs().sum() == 0


def test_columns_that_read_pruned_filters_stand_still():
    """Set aside during S2, back at the same values with outgoing weights kept."""
    from repr_det import Reinit

    model = net("chain")
    trainer = OPTIMIZERS["momentum"](model.parameters())
    method = RePr(model, trainer, RePrSchedule(2, 4, 1), 0.3, reinit=Reinit(outgoing=1.0))
    for i in range(2):
        method.step(i)
        train_step(model, trainer, i, torch.float64)
    linear = model[-1]
    before, momentum = (
        linear.weight.detach().clone(),
        trainer.state[linear.weight]["momentum_buffer"].clone(),
    )
    for i in range(2, 6):
        method.step(i)
        features = method.pruned["7"].repeat_interleave(4)
        assert linear.weight[:, features].abs().sum() == 0
        train_step(model, trainer, i, torch.float64)
    method.step(6)
    assert torch.equal(linear.weight[:, features], before[:, features])
    after = trainer.state[linear.weight]["momentum_buffer"]
    assert torch.equal(after[:, features], momentum[:, features])
    assert not torch.equal(linear.weight[:, ~features], before[:, ~features])
