"""Promise 1 where Detectron2 has a hand in the step: its clipping, mixed precision."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.solver.build import maybe_add_gradient_clipping

from repr_det import RePrSchedule
from repr_det.method.warmup import RateWarmup
from tests.method import test_exact
from tests.method.nets import loss


def clipping(kind, form):
    """An optimizer with Detectron2's clipping, built as a class or put onto an instance."""
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = {"norm": 0.05, "value": 0.01}[kind]
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-2}

    def build(parameters):
        if form == "class":
            return maybe_add_gradient_clipping(cfg, torch.optim.SGD)(parameters, **options)
        return maybe_add_gradient_clipping(cfg, torch.optim.SGD(parameters, **options))

    return build


@pytest.mark.parametrize("form", ["class", "instance"])
@pytest.mark.parametrize("kind", ["norm", "value"])
@pytest.mark.parametrize("name", ["residual", "residual-bias", "residual-bias-silu"])
def test_detectron2_clipping_sees_the_smaller_network(monkeypatch, name, kind, form):
    monkeypatch.setitem(test_exact.OPTIMIZERS, "clipped", clipping(kind, form))
    model, reference, losses, _ = test_exact.side_by_side(name, "clipped", torch.float64)
    test_exact.assert_same(model, reference, losses)


@pytest.mark.parametrize("form", ["class", "instance"])
def test_detectron2_clipping_steps_once_at_the_lower_rate(form):
    """Its class form runs the hooks of a step twice once a plain optimizer of its class exists."""
    weight = torch.nn.Parameter(torch.zeros(1))
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    optimizer = clipping("value", form)([weight])
    RateWarmup(optimizer, RePrSchedule(3, 2, 1), 3).set_iteration(6)  # the second after the return
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == pytest.approx(-0.01 * 0.02 * 2 / 4)
    assert optimizer.param_groups[0]["lr"] == 0.02


@pytest.mark.parametrize("name", ["chain", "residual", "residual-gelu"])
def test_bfloat16_on_a_cpu(monkeypatch, name):
    """The forward pass in 8 bits of mantissa: a smaller matrix is summed in another order."""

    def autocast_loss(model, data):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(model, data)

    monkeypatch.setattr(test_exact, "loss", autocast_loss)
    _, _, losses, method = test_exact.side_by_side(name, "momentum", torch.float32)
    # One unit in the last place of bfloat16; 0 where both sums are rounded alike, as measured here.
    torch.testing.assert_close(losses[0], losses[1], rtol=2**-8, atol=2**-8)
    for layer in method.layers:
        assert layer.matrix()[method.pruned[layer.name]].abs().sum() == 0


def test_sync_bn_over_gloo():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(root / "tests/engine/sync_bn.py")],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
