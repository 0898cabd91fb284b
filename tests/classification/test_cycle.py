"""Every model of the paper and every criterion go through two cycles in the real trainer."""

from __future__ import annotations

import pytest
import torch
from detectron2.engine import HookBase

from repr_det.classification import ClassificationTrainer
from repr_det.classification.models.registry import PAPER_NAMES
from repr_det.method.criteria import CRITERIA
from tests.classification.settings import make_arrays, register, small_cfg
from tests.device import DEVICE
from tests.grids import covering

pytestmark = pytest.mark.gpu

ON_CPU = DEVICE.type == "cpu"
# Tens of seconds each on two cores.
LARGE = {
    "cifar_resnet110",
    "cifar_resnet182",
    "cifar_densenet100",
    "bn_inception",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "vgg16",
}
IMAGENET_NAMES = (
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    "vgg16",
    "googlenet",
)


class Watch(HookBase):
    """Records, after every step, how many filters are out and whether they are at zero."""

    def __init__(self, method):
        self.method = method
        self.counts = []

    def after_step(self):
        self.counts.append(self.method.num_pruned)
        modules = dict(self.trainer.model.named_modules())
        for name, mask in self.method.pruned.items():
            assert not modules[name].weight[mask].any(), name


def cycles(tmp_path, name, criterion="ortho", size=32, amp=False):
    images, labels = make_arrays(8, size=size)
    register("cycles_train", images, labels, list("abcd"))
    cfg = small_cfg(str(tmp_path))
    cfg.MODEL.CLASSIFIER.NAME = name
    cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED = str(DEVICE), amp
    cfg.INPUT.IMAGE_SIZE = size
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("cycles_train",)
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.BASE_LR = 0.001
    cfg.SOLVER.MAX_ITER = 6
    cfg.REPR.ENABLED = True
    cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N = 1, 1, 2
    cfg.REPR.CRITERION = criterion
    torch.manual_seed(0)
    trainer = ClassificationTrainer(cfg)
    method = trainer._repr_hook.method
    watch = Watch(method)
    trainer.register_hooks([watch])
    trainer.train()
    dropped = int(0.3 * sum(layer.num_filters for layer in method.layers))
    assert watch.counts == [0, dropped, 0, dropped, 0, 0]
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    for layer in method.layers:
        norms = dict(trainer.model.named_modules())[layer.name].weight.flatten(1).norm(dim=1)
        assert (norms > 0).all(), layer.name
    right = trainer.model.eval()({"image": images}).argmax(1).cpu() == labels
    assert trainer._last_eval_results["accuracy"]["top1"] == 100 * right.float().mean()
    convs = [n for n, m in trainer.model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    return convs, [layer.name for layer in method.layers]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in LARGE and ON_CPU else name
        for name in (*PAPER_NAMES, *IMAGENET_NAMES)
    ],
)
def test_every_model_of_the_paper(tmp_path, name):
    convs, layers = cycles(tmp_path, name)
    # All but the stem take part, GoogLeNet's auxiliary heads, which only training uses, included.
    assert set(layers) == set(convs[1:])


@pytest.mark.parametrize("name", ["c3_8", "cifar_resnet20", "cifar_densenet5"])
def test_mixed_precision(tmp_path, name):
    """float16 on a GPU, bfloat16 on a CPU."""
    cycles(tmp_path, name, amp=True)


@pytest.mark.parametrize(
    ("criterion", "name"), covering(sorted(CRITERIA), ["c3_8", "c3_8_bn", "cifar_densenet5"])
)
def test_every_criterion(tmp_path, name, criterion):
    cycles(tmp_path, name, criterion, size=16)
