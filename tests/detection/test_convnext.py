"""A ConvNeXt as a detector's backbone."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_backbone

from repr_det import RePr, RePrSchedule
from repr_det.engine.config import config_path
from repr_det.errors import UserError
from repr_det.tasks import get_cfg


def configured(*overrides):
    cfg = get_cfg()
    cfg.merge_from_file(config_path("shapes_convnext.yaml"))
    cfg.merge_from_list(["MODEL.CONVNEXT.DEPTHS", [1, 1, 1], *overrides])
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def test_strides_and_widths_are_those_it_says():
    backbone = build_backbone(configured()).bottom_up
    found = backbone(torch.zeros(1, 3, 64, 64))
    shapes = backbone.output_shape()
    assert list(found) == list(shapes) == ["c2", "c3", "c4"]
    for name, shape in shapes.items():
        assert found[name].shape == (1, shape.channels, 64 // shape.stride, 64 // shape.stride)


def test_hidden_units_of_every_block_take_part():
    backbone = build_backbone(configured())
    trainer = torch.optim.SGD(backbone.parameters(), 0.1)
    method = RePr(backbone, trainer, RePrSchedule(1, 1, 1), linear=True)
    names = [name for name in method.pruned if name in method.graph.linears]
    assert names == [f"bottom_up.features.{stage}.0.block.3" for stage in (1, 3, 5)]


def test_lists_of_other_lengths_are_refused():
    with pytest.raises(UserError, match=r"DEPTHS is \[1, 1, 1\] and WIDTHS is \[8, 8\]"):
        build_backbone(configured("MODEL.CONVNEXT.WIDTHS", [8, 8]))
