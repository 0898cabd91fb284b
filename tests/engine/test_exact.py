"""Promise 1 where Detectron2 has a hand in the step: its clipping, mixed precision."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import HookBase
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.env import seed_all_rng

from repr_det import RePrSchedule
from repr_det.detection.trainer import DetectionTrainer
from repr_det.method.warmup import RateWarmup
from tests.device import DEVICE
from tests.engine import killed_run
from tests.method import nets
from tests.method.nets import loss
from tests.method.side_by_side import assert_same, side_by_side


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
def test_detectron2_clipping_sees_the_smaller_network(name, kind, form):
    model, reference, losses, _ = side_by_side(name, clipping(kind, form), torch.float64)
    assert_same(model, reference, losses)


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


ULP = {"bfloat16": 2**-8, "float16": 2**-11}
"""One unit in the last place."""


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ULP)
@pytest.mark.parametrize("name", ["chain", "residual", "residual-gelu"])
def test_mixed_precision(name, precision):
    """The forward pass in few bits: a smaller matrix is summed in another order."""
    if precision == "float16" and DEVICE.type == "cpu":
        pytest.skip("float16 needs a GPU")

    def autocast_loss(model, data):
        with torch.autocast(DEVICE.type, dtype=getattr(torch, precision)):
            return loss(model, data)

    _, _, losses, method = side_by_side(name, "momentum", torch.float32, loss=autocast_loss)
    # 0 where both sums are rounded alike, as measured here.
    tolerance = ULP[precision]
    torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=tolerance)
    for layer in method.layers:
        assert layer.matrix()[method.pruned[layer.name]].abs().sum() == 0


FUSED = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-2, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-1, fused=True),
}


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", FUSED)
@pytest.mark.parametrize("name", ["residual", "residual-bias-silu"])
def test_fused_optimizers(name, optimizer):
    model, reference, losses, _ = side_by_side(name, FUSED[optimizer], torch.float64)
    assert_same(model, reference, losses)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["chain-silu", "residual", "residual-frozen-silu", "dense"])
def test_channels_last(name):
    def last(*arguments):
        return nets.net(*arguments).to(memory_format=torch.channels_last)

    model, reference, losses, _ = side_by_side(name, "adamw", torch.float64, net=last)
    assert_same(model, reference, losses)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("mode", "compact"),
    [
        *(("float32", "off"), ("float32", "on"), ("bfloat16", "on"), ("float16", "on")),
        ("channels last", "on"),
        pytest.param(*("compiled", "on"), marks=pytest.mark.slow if DEVICE.type == "cpu" else []),
    ],
)
def test_a_detector_in_every_mode(tmp_path, mode, compact):
    """Trains, stays exactly zero in S2, and goes on from checkpoints of both phases."""
    if mode == "float16" and DEVICE.type == "cpu":
        pytest.skip("float16 needs a GPU")
    cfg = killed_run.detection(str(tmp_path))
    cfg.REPR.ENABLED, cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N = True, 2, 2, 1
    cfg.REPR.COMPACT = compact
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 6, 1
    cfg.DATASETS.TEST = ()
    cfg.SOLVER.AMP.ENABLED = mode.endswith("float16")
    cfg.SOLVER.AMP.PRECISION = mode if cfg.SOLVER.AMP.ENABLED else "auto"
    cfg.MODEL.CHANNELS_LAST = mode == "channels last"
    for resumed_from in (None, 0, 2):
        seed_all_rng(1)
        if resumed_from is not None:
            (tmp_path / "last_checkpoint").write_text(f"model_{resumed_from:07d}.pth")
        trainer = DetectionTrainer(cfg)
        if mode == "compiled":
            trainer.model.backbone.compile(backend="aot_eager")
        trainer.resume_or_load(resume=resumed_from is not None)
        trainer.register_hooks([Held()])
        trainer.train()
        assert all(p.isfinite().all() for p in trainer.model.parameters())
        assert trainer._repr_hook.method.phase == "full"


class Held(HookBase):
    """Looks at the checkpoint's view of the model: pruned filters are zero, and none is missing."""

    def after_step(self):
        method = self.trainer._repr_hook.method
        state = self.trainer.model.state_dict()
        for layer in method.layers:
            weight = state[f"{layer.name}.weight"]
            assert weight[method.pruned[layer.name]].count_nonzero() == 0


@pytest.mark.slow
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
