"""The shipped configs of classification are what their comments say."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from torchvision.models import ResNet18_Weights

from repr_det import RePr, RePrSchedule
from repr_det.classification import add_classification_config, build_classifier, resolve_epochs
from repr_det.engine.config import get_cfg
from tests.shipped import CLASSIFIERS as CONFIGS
from tests.shipped import first_fall

IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "imagenet": 1_281_167}
# Its rate falls all the time.
BACK_TOO_LATE = {"cifar10_c3_32_authors"}


def load(path):
    cfg = get_cfg(add_classification_config)
    cfg.merge_from_file(str(path))
    return resolve_epochs(cfg, IMAGES[path.stem.partition("_")[0]] - cfg.DATASETS.HELD_OUT)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_builds_its_network_and_ends_cycles_in_time(path):
    cfg = load(path)
    assert cfg.MODEL.META_ARCHITECTURE == "ImageClassifier"
    with torch.device("meta"):
        build_classifier(
            cfg.MODEL.CLASSIFIER.NAME,
            cfg.MODEL.CLASSIFIER.NUM_CLASSES,
            cfg.MODEL.CLASSIFIER.DROPOUT,
            cfg.INPUT.IMAGE_SIZE,
        )
    schedule = RePrSchedule(cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N)
    schedule.check_fits(cfg.SOLVER.MAX_ITER)
    # Filters come back before the rate falls, where they would have little time to learn.
    assert (schedule.end < first_fall(cfg)) == (path.stem not in BACK_TOO_LATE)


def test_imagenet_has_the_means_that_torchvision_trains_with():
    usual = ResNet18_Weights.DEFAULT.transforms()
    for path in CONFIGS:
        if path.stem.startswith("imagenet"):
            cfg = load(path)
            assert cfg.INPUT.FORMAT == "RGB"
            assert pytest.approx([255 * mean for mean in usual.mean]) == cfg.MODEL.PIXEL_MEAN
            assert pytest.approx([255 * std for std in usual.std]) == cfg.MODEL.PIXEL_STD


@pytest.fixture
def authors():
    return load(next(path for path in CONFIGS if path.stem == "cifar10_c3_32_authors"))


def test_the_authors_rank_the_first_layer_too(authors):
    model = build_model(authors)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = RePr(model, optimizer, RePrSchedule(1, 1, 1), include=list(authors.REPR.INCLUDE))
    assert [tuple(layer.weight.shape) for layer in method.layers] == [
        (32, 3, 5, 5),
        (32, 32, 5, 5),
        (32, 32, 5, 5),
    ]


def test_the_authors_setting_has_their_379_epochs(authors):
    cfg = authors
    epoch = 45_000 / 64
    assert pytest.approx(379 * epoch, abs=1) == cfg.SOLVER.MAX_ITER
    sub = cfg.REPR.N * cfg.REPR.S2
    assert sub == pytest.approx(180 * epoch, rel=1e-3)
    assert cfg.SOLVER.MAX_ITER - sub == pytest.approx(199 * epoch, rel=1e-3)
