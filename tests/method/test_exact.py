"""Promise 1: the sub-network trains as the physically smaller network does."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repr_det import RePr, RePrSchedule
from tests.grids import covering
from tests.method.nets import NETS, OPTIMIZERS, batch, check_held, loss, net
from tests.method.side_by_side import (
    TOLERANCE,
    assert_same,
    clip_all_by_norm,
    clip_by_norm,
    clip_by_value,
    side_by_side,
    train_step,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("name", "optimizer"), covering(NETS, OPTIMIZERS))
def test_trains_as_the_smaller_network(name, optimizer):
    model, reference, losses, _ = side_by_side(name, optimizer, torch.float64)
    assert_same(model, reference, losses)
    tolerance = TOLERANCE[torch.float64]
    outputs = [network.eval()(batch(0)[0]) for network in (model, reference)]
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("clip", [clip_by_norm, clip_all_by_norm, clip_by_value])
@pytest.mark.parametrize("name", ["chain", "residual", "residual-bias", "residual-bias-silu"])
def test_clipping_sees_the_smaller_network(name, clip):
    model, reference, losses, _ = side_by_side(name, "momentum", torch.float64, clip)
    assert_same(model, reference, losses)


@pytest.mark.parametrize("name", ["chain", "residual-bias", "chain-silu"])
def test_float32(name):
    model, reference, losses, _ = side_by_side(name, "momentum", torch.float32)
    assert_same(model, reference, losses)


@pytest.mark.parametrize("name", [*NETS])
def test_output_after_the_norm_is_zero(name):
    """In training and evaluation mode, at the last place before filters are mixed."""
    model, _, _, method = side_by_side(name, "momentum", torch.float64)
    outputs = {}
    watched = {}
    for layer in method.layers:
        # The pre-activation net has norms behind every concatenation; its own test is the zero
        # of the conv, which is what those norms see.
        module = (
            layer.norms[0].module if layer.norms and not name.startswith("dense") else layer.module
        )
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


def test_running_mean_of_a_pruned_channel_is_zero_without_gamma_and_beta():
    """Nothing else would take it out of the output in evaluation."""
    model = net("residual-plain")
    trainer = OPTIMIZERS["momentum"](model.parameters())
    method = RePr(model, trainer, RePrSchedule(3, 3, 1), 0.3)
    norms = {layer.name: layer.norms[0].module for layer in method.layers if layer.norms}
    for i in range(6):
        method.step(i)
        for name, norm in norms.items():
            assert torch.equal(norm.running_mean == 0, method.pruned[name]) or i == 0
        train_step(model, trainer, i, torch.float64)
    assert sum(int(method.pruned[name].sum()) for name in norms) > 1


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


class Sum(nn.Module):
    """A block with a shortcut, whose last conv can also be read past its norm."""

    def __init__(self, past_the_norm: bool = False) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.linear = nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.share = nn.Parameter(torch.zeros(())) if past_the_norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.linear(torch.relu(self.block(x)).mean((2, 3)))

    def block(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        past = 0 if self.share is None else self.share * y
        return x + self.norm(y) + past


def prune_half(model: nn.Module, optimizer: str = "adam") -> tuple[RePr, torch.optim.Optimizer]:
    trainer = OPTIMIZERS[optimizer](model.parameters())
    method = RePr(model, trainer, RePrSchedule(1, 99, 1), 0.5)
    method.step(1)
    return method, trainer


def test_conv_that_is_also_read_past_its_norm_is_held():
    """Although no gradient comes that way until the share of it has moved from zero."""
    torch.manual_seed(0)
    model = Sum(past_the_norm=True)
    method, trainer = prune_half(model)
    for i in range(4):
        train_step(model, trainer, i, torch.float32)
        check_held(method)
    assert model.share != 0 and model.conv.weight.grad.any()


def test_norm_that_the_first_steps_do_not_take():
    """As of domains that come in turns: what one backward shows of a sum is not taken for all."""
    torch.manual_seed(0)
    model = Sum()
    method, trainer = prune_half(model)
    norms = [model.norm, nn.BatchNorm2d(8)]
    for i in range(4):
        model.norm = norms[i % 2]
        train_step(model, trainer, i, torch.float32)
        assert not model.conv.weight[method.pruned["conv"]].any()


def test_regulariser_that_begins_late_does_not_wake_a_filter_in_a_sum():
    torch.manual_seed(0)
    model = Sum()
    method, trainer = prune_half(model)
    for i in range(4):
        trainer.zero_grad()
        penalty = (model.conv.weight - 0.1).square().sum() if i > 1 else 0
        (loss(model, batch(i, torch.float32)) + penalty).backward()
        trainer.step()
        check_held(method)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_backward_within_backward(optimizer):
    """Reentrant checkpointing: gradients of the block are accumulated by a backward of its own."""
    torch.manual_seed(0)
    model = Sum()
    method, trainer = prune_half(model, optimizer)
    block = model.block
    model.block = lambda x: checkpoint(block, x, use_reentrant=True)
    for i in range(4):
        train_step(model, trainer, i, torch.float32)
        check_held(method)
    assert model.norm.bias.grad.any()


def test_backward_after_one_that_failed():
    torch.manual_seed(0)
    model = Sum()
    method, trainer = prune_half(model)
    train_step(model, trainer, 0, torch.float32)

    def fail(gradient: Tensor) -> None:
        raise RuntimeError("on purpose")

    handle = model.stem.weight.register_hook(fail)  # the last that backward comes to
    with pytest.raises(RuntimeError, match="on purpose"):
        loss(model, batch(1, torch.float32)).backward()
    handle.remove()
    trainer.step()  # on what came before it failed
    check_held(method)
    for i in range(2, 4):
        train_step(model, trainer, i, torch.float32)
        check_held(method)


def test_held_where_one_process_is_distributed():
    """DistributedDataParallel writes gradients from its buckets at the end of backward."""
    torch.manual_seed(0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = Sum()
        method, trainer = prune_half(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for i in range(3):
            train_step(wrapped, trainer, i, torch.float32)
            check_held(method)
    finally:
        dist.destroy_process_group()


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
