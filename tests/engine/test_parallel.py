"""DistributedDataParallel around a network that gets smaller and whole again."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from repr_det.engine.parallel import reason_against_other_sizes, renew_buckets
from tests.method.nets import batch, loss, net


@pytest.fixture(autouse=True)
def group(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def resized(model, rows):
    """The first conv of a chain and what reads it, with another number of filters."""
    network = model.module
    torch.manual_seed(1)
    for parameter, shape in (
        (network[0].weight, (rows, *network[0].weight.shape[1:])),
        (network[3].weight, (8, rows, 3, 3)),
        (network[1].weight, (rows,)),
        (network[1].bias, (rows,)),
    ):
        parameter.grad = None
        parameter.data = torch.empty(0, dtype=torch.float32)
        parameter.data = torch.rand(shape, dtype=torch.float64)
    network[1].running_mean, network[1].running_var = torch.zeros(rows), torch.ones(rows)
    network[1].double()


SETTINGS = {
    "find_unused_parameters": True,
    "static_graph": True,
    "gradient_as_bucket_view": True,
    "bucket_cap_mb": 3,
    "broadcast_buffers": False,
}


@pytest.mark.parametrize("setting", [None, *SETTINGS])
def test_settings_hooks_and_gradients_survive(setting):
    called = []

    def counted(state, bucket):
        called.append(bucket.buffer().numel())
        return default_hooks.allreduce_hook(state, bucket)

    own = dist.new_group([0])
    arguments = {} if setting is None else {setting: SETTINGS[setting]}
    model = DistributedDataParallel(net("chain"), process_group=own, **arguments)
    model.register_comm_hook(None, counted)
    model.register_forward_hook(lambda *_: called.append("forward"))
    before = {k: v for k, v in vars(model).items() if isinstance(v, (bool, int))}
    loss(model, batch(0)).backward()
    for rows in (5, 8):
        resized(model, rows)
        renew_buckets(model)
        assert model.process_group is own
        after = {k: v for k, v in vars(model).items() if k in before}
        assert after == before | {"_lazy_init_ran": False, "_has_rebuilt_buckets": False}
        for step in range(3):
            called.clear()
            model.zero_grad()
            loss(model, batch(step)).backward()
            numbers = [entry for entry in called if entry != "forward"]
            assert sum(numbers) == sum(p.numel() for p in model.parameters())
            assert "forward" in called
            mine = [p.grad.clone() for p in model.parameters()]
            model.module.zero_grad()
            loss(model.module, batch(step)).backward()
            theirs = [p.grad for p in model.parameters()]
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
            if setting == "gradient_as_bucket_view":
                model.zero_grad()


def test_wrappers_that_hold_sizes_of_their_own_are_named():
    assert reason_against_other_sizes(net("chain")) == ""
    assert reason_against_other_sizes(DistributedDataParallel(net("chain"))) == ""
    inner = nn.Sequential(DistributedDataParallel(net("chain")))
    assert "inside another wrapper" in reason_against_other_sizes(inner)
    with_state = DistributedDataParallel(net("chain"))
    with_state.register_comm_hook(powerSGD_hook.PowerSGDState(None), powerSGD_hook.powerSGD_hook)
    assert "has a state of its own" in reason_against_other_sizes(with_state)
    built_in = DistributedDataParallel(net("chain"))
    built_in._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    assert "built-in communication hook" in reason_against_other_sizes(built_in)
