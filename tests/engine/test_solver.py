from __future__ import annotations

import copy

import pytest
import torch
from detectron2.config import get_cfg
from torch import nn

from repr_det.engine.solver import add_solver_config, build_lr_scheduler, build_optimizer


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_solver_config(cfg)
    cfg.SOLVER.WARMUP_ITERS = 0
    return cfg


@pytest.fixture
def model():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_optimizer_by_name_with_detectron2s_groups(cfg, model, name):
    cfg.SOLVER.OPTIMIZER = name
    cfg.SOLVER.BASE_LR = 0.02
    cfg.SOLVER.WEIGHT_DECAY = 0.03
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.04
    optimizer = build_optimizer(cfg, model)
    assert type(optimizer) is getattr(torch.optim, name)
    by_parameter = {p: g for g in optimizer.param_groups for p in g["params"]}
    assert set(by_parameter) == set(model.parameters())
    assert by_parameter[model[0].weight]["weight_decay"] == 0.03
    assert by_parameter[model[1].weight]["weight_decay"] == 0.04
    assert all(group["lr"] == 0.02 for group in optimizer.param_groups)


def test_momentum_belongs_to_sgd(cfg, model):
    cfg.SOLVER.MOMENTUM = 0.8
    assert build_optimizer(cfg, model).defaults["momentum"] == 0.8
    cfg.SOLVER.OPTIMIZER = "RMSprop"
    assert build_optimizer(cfg, model).defaults["momentum"] == 0
    assert build_optimizer(cfg, model).defaults["alpha"] == 0.99
    cfg.SOLVER.OPTIMIZER = "Adam"
    cfg.SOLVER.BETAS = (0.8, 0.9)
    assert build_optimizer(cfg, model).defaults["betas"] == (0.8, 0.9)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_gradient_clipping(cfg, name):
    cfg.SOLVER.OPTIMIZER = name
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.1
    model = nn.Linear(1, 1)
    optimizer = build_optimizer(cfg, model)
    model.weight.grad = torch.full((1, 1), 5.0)
    model.bias.grad = torch.full((1,), 5.0)
    optimizer.step()
    assert model.weight.grad.item() == pytest.approx(0.1)


def test_unknown_optimizer(cfg, model):
    cfg.SOLVER.OPTIMIZER = "LBFGS"
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER is 'LBFGS'. Set one of SGD, Adam"):
        build_optimizer(cfg, model)


def rates(cfg, model):
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    found = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_staircase(cfg, model):
    cfg.SOLVER.BASE_LR = 0.1
    cfg.SOLVER.MAX_ITER = 30
    cfg.SOLVER.STEPS = (10, 20)
    assert rates(cfg, model) == pytest.approx([0.1] * 10 + [0.01] * 10 + [0.001] * 10)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("WarmupMultiStepLR", "STEPS", (20, 10)),
        ("WarmupCosineLR", "BASE_LR_END", 1.0),
        ("WarmupCosineLR", "BASE_LR", 0.0),
    ],
)
def test_keys_that_detectron2_builds_no_schedule_of(cfg, model, name, key, value):
    optimizer = build_optimizer(cfg, model)
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER[key] = name, value
    with pytest.raises(ValueError, match=f"{name} cannot be built .* Correct SOLVER.STEPS"):
        build_lr_scheduler(cfg, optimizer)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_cyclical(cfg, model, name):
    cfg.SOLVER.OPTIMIZER = name
    cfg.SOLVER.LR_SCHEDULER_NAME = "Triangular"
    cfg.SOLVER.BASE_LR = 0.001
    cfg.SOLVER.CYCLE_AMPLITUDE = 0.005
    cfg.SOLVER.CYCLE_ITERS = 10
    cfg.SOLVER.MAX_ITER = 25
    period = [0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.005, 0.004, 0.003, 0.002]
    assert rates(cfg, model) == pytest.approx((period * 3)[:25])


def test_cyclical_after_warmup(cfg, model):
    cfg.SOLVER.LR_SCHEDULER_NAME = "Triangular"
    cfg.SOLVER.BASE_LR = 0.001
    cfg.SOLVER.CYCLE_ITERS = 10
    cfg.SOLVER.MAX_ITER = 20
    cfg.SOLVER.WARMUP_ITERS = 4
    cfg.SOLVER.WARMUP_FACTOR = 0.0
    found = rates(cfg, model)
    assert found[:5] == pytest.approx([0.0, 0.00125, 0.0025, 0.00375, 0.005])
    assert found[10] == pytest.approx(0.001)


def test_cyclical_continues_after_a_resume(cfg, model):
    cfg.SOLVER.LR_SCHEDULER_NAME = "Triangular"
    cfg.SOLVER.CYCLE_ITERS = 10
    cfg.SOLVER.MAX_ITER = 25
    whole = rates(cfg, model)
    optimizer = build_optimizer(cfg, model)
    first = build_lr_scheduler(cfg, optimizer)
    for _ in range(13):
        optimizer.step()
        first.step()
    again = build_optimizer(cfg, model)
    second = build_lr_scheduler(cfg, again)
    second.load_state_dict(first.state_dict())
    again.load_state_dict(optimizer.state_dict())
    again.step()
    second.step()
    assert again.param_groups[0]["lr"] == pytest.approx(whole[14])


def test_cyclical_with_an_unknown_warm_up(cfg, model):
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.CYCLE_ITERS = "Triangular", 10
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_METHOD = 5, "foo"
    with pytest.raises(ValueError, match="SOLVER.WARMUP_METHOD is 'foo'. Set linear or constant"):
        build_lr_scheduler(cfg, build_optimizer(cfg, model))


def test_cyclical_without_a_period_or_a_rate(cfg, model):
    cfg.SOLVER.LR_SCHEDULER_NAME = "Triangular"
    with pytest.raises(ValueError, match="SOLVER.CYCLE_ITERS is 0"):
        build_lr_scheduler(cfg, build_optimizer(cfg, model))
    cfg.SOLVER.CYCLE_ITERS, cfg.SOLVER.BASE_LR = 10, 0.0
    with pytest.raises(ValueError, match="SOLVER.BASE_LR is 0.0. Set a rate above 0"):
        build_lr_scheduler(cfg, build_optimizer(cfg, model))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_fused_step_is_the_same_step(cfg, model, name):
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.WEIGHT_DECAY = name, 0.1
    other = copy.deepcopy(model)
    optimizers = [build_optimizer(cfg, model)]
    cfg.SOLVER.FUSED = True
    optimizers.append(build_optimizer(cfg, other))
    assert all(group["fused"] for group in optimizers[1].param_groups)
    for _ in range(3):
        for network, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            network(torch.ones(2, 3, 3, 3)).square().sum().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_rmsprop_has_no_fused_step(cfg, model):
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.FUSED = "RMSprop", True
    with pytest.raises(ValueError, match="no fused RMSprop"):
        build_optimizer(cfg, model)
