"""Faster and Mask R-CNN go through two cycles in the real trainer, and go on from a checkpoint."""

from __future__ import annotations

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng

from repr_det.detection.shapes import ShapesSpec, register_shapes
from repr_det.detection.trainer import DetectionTrainer
from repr_det.engine.config import config_path
from repr_det.tasks import get_cfg
from tests.detectors import shrink
from tests.device import DEVICE

pytestmark = pytest.mark.gpu

S1 = S2 = 2
LAST = 2 * (S1 + S2) + 1


class Watch(HookBase):
    """Records how many filters are pruned, which all are zero in the model's state."""

    def __init__(self):
        self.counts = {}

    def after_step(self):
        method = self.trainer._repr_hook.method
        state = self.trainer.model.state_dict()
        for name, pruned in method.pruned.items():
            assert state[f"{name}.weight"][pruned].count_nonzero() == 0, name
        self.counts[self.trainer.iter] = method.num_pruned


def trained(cfg, resume):
    """The trainer after training, and its numbers of pruned filters by iteration."""
    seed_all_rng(1)
    trainer = DetectionTrainer(cfg)
    watch = Watch()
    trainer.register_hooks([watch])
    trainer.resume_or_load(resume=resume)
    trainer.train()
    assert {p.device.type for p in trainer.model.parameters()} == {DEVICE.type}
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    return trainer, watch.counts


@pytest.mark.parametrize(
    ("config", "amp"),
    [
        ("repr_faster_rcnn.yaml", False),
        ("repr_faster_rcnn.yaml", True),
        ("repr_mask_rcnn.yaml", True),
    ],
)
def test_two_cycles_and_a_resumed_run(tmp_path, config, amp):
    """Filters are taken out under AMP: float16 on a GPU, bfloat16 on a CPU."""
    register_shapes(ShapesSpec(size=64, train=12, val=4), prefix="two_cycles")
    cfg = get_cfg()
    cfg.merge_from_file(config_path(config))
    shrink(cfg, tmp_path)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 6
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("two_cycles_train",), ()
    cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N = S1, S2, 2
    cfg.REPR.COMPACT = "on" if amp else "off"
    cfg.SOLVER.MAX_ITER = LAST
    cfg.SOLVER.CHECKPOINT_PERIOD = last_saved = 2 * S1 + S2 + 1
    cfg.SOLVER.AMP.ENABLED = amp
    whole, counts = trained(cfg, resume=False)
    layers = whole._repr_hook.method.layers
    dropped = int(0.3 * sum(layer.num_filters for layer in layers))
    assert list(counts.values()) == [0] * S1 + [dropped] * S2 + [0] * S1 + [dropped] * S2 + [0]

    # In S2 of the second cycle.
    (tmp_path / "last_checkpoint").write_text(f"model_{last_saved - 1:07d}.pth")
    resumed, rest = trained(cfg, resume=True)
    assert rest == {i: n for i, n in counts.items() if i >= last_saved}
    first, second = (t._repr_hook.method.history for t in (whole, resumed))
    assert [entry["iteration"] for entry in first] == [S1, 2 * S1 + S2]
    for one, other in zip(first, second, strict=True):
        for name, pruned in one["pruned"].items():
            assert torch.equal(pruned, other["pruned"][name])
