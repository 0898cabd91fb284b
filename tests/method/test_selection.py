"""Which layers take part: patterns and defaults."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from repr_det import RePr, RePrSchedule
from repr_det.errors import UserError
from repr_det.method.selection import matches, select_layers
from tests.method.nets import Residual, chain


def method_of(model, **arguments):
    return RePr(model, torch.optim.SGD(model.parameters(), 0.1), RePrSchedule(1, 1, 1), **arguments)


def names_of(model, **arguments):
    return [layer.name for layer in method_of(model, **arguments).layers]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("backbone", True), ("backbone.fpn*", True), ("*.lateral", False), ("back*", True),
        ("backbone.fpn.lateral2", True), ("fpn", False), ("*lateral?", True), ("bone", False),
    ],
)  # fmt: skip
def test_patterns_take_what_lies_below(pattern, expected):
    assert matches("backbone.fpn.lateral2", [pattern]) is expected


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_one_string_is_no_list_of_patterns(key):
    with pytest.raises(UserError, match=r"is 'block\*'. Set a list of patterns, as \['block\*'\]"):
        method_of(Residual(), **{key: "block*"})


@pytest.mark.parametrize("key", ["batches", "loss"])
def test_loader_in_place_of_a_function_is_refused(key):
    given = {"batches": lambda: iter([]), "loss": lambda model, batch: None, key: [1, 2]}
    with pytest.raises(UserError, match=f"{key} is a list. Set a function, as lambda"):
        method_of(Residual(), **given)


def test_default_spares_stem_and_prediction_layers():
    assert names_of(Residual()) == [
        "block1.conv1", "block1.conv2", "block1.conv3", "block1.shortcut",
        "block2.conv1", "block2.conv2", "block2.conv3", "down", "lateral1", "lateral2", "output",
        "up",
    ]  # fmt: skip


def test_default_takes_the_backbone_where_there_is_one():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Residual()
            self.predict = nn.Conv2d(2, 4, 1)
            self.head = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.head(self.predict(self.backbone(x)[:, :, None, None]))

    names = names_of(Detector())
    # Only the stem is spared: what is last in a backbone is read by the heads.
    assert len(names) == 13
    assert "backbone.head" in names
    assert "backbone.stem" not in names
    assert names_of(Detector(), include=["predict"]) == ["predict"]


def test_include_takes_stem_and_head_only_by_their_own_name():
    assert names_of(chain(), include=["*"])  # matches every own name
    model = nn.Sequential()
    model.add_module("body", chain())
    assert names_of(model) == ["body.3", "body.7"]
    assert names_of(model, include=["body"]) == ["body.3", "body.7"]
    assert names_of(model, include=["body.0", "body.3"]) == ["body.0", "body.3"]
    assert names_of(Residual(), include=["head", "up"]) == ["up", "head"]


def test_exclude_wins():
    names = names_of(Residual(), include=["block1", "block2"], exclude=["*.conv2", "block2"])
    assert names == ["block1.conv1", "block1.conv3", "block1.shortcut"]


def test_pattern_that_matches_nothing_is_told_with_names_that_exist():
    for key in ("include", "exclude"):
        with pytest.raises(ValueError, match=rf"{key.upper()} pattern 'blok1'.*: stem, block1"):
            method_of(Residual(), **{key: ["block1", "blok1"]})


def depthwise(width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 1),
        nn.Conv2d(width, width, 3, groups=width),
        nn.Conv2d(width, 1, 1),
        nn.Conv2d(1, width, 1),
        nn.Conv2d(width, width, 3, groups=width // 2),
        nn.Conv2d(width, 2, 1),
    )


def test_depthwise_and_single_filters_take_no_part():
    assert names_of(depthwise(), include=["*"]) == ["0", "3", "4", "5"]
    with pytest.raises(ValueError, match="all 2 matching conv layers are depthwise, complex or "):
        method_of(depthwise(), include=["1", "2"])


class Spectral(nn.Module):
    """Convs between which the features are complex."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 8, 1, dtype=torch.complex64)
        self.c, self.d = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x).to(torch.complex64)).abs()))


def test_complex_layers_take_no_part():
    model = Spectral()
    method = method_of(model, include=["*"], prune_ratio=0.5)
    assert [layer.name for layer in method.layers] == ["a", "c", "d"]
    before = model.b.weight.detach().clone()
    method.step(1)
    assert method.pruned["a"].any()
    method.step(2)
    assert method.num_pruned == 0 and torch.equal(model.b.weight, before)


def test_frozen_layers_and_layers_outside_the_optimizer_take_no_part():
    model = chain()
    model[3].weight.requires_grad_(False)
    assert names_of(model) == ["7"]
    model = chain()
    optimizer = torch.optim.SGD(
        [p for n, p in model.named_parameters() if not n.startswith("7")], 1
    )
    model[7].requires_grad_(False)
    assert [x.name for x in RePr(model, optimizer, RePrSchedule(1, 1, 1)).layers] == ["3"]
    with pytest.raises(UserError, match="the 1 that match are frozen"):
        RePr(model, optimizer, RePrSchedule(1, 1, 1), include=["7"])


def test_layer_that_holds_anothers_weight_takes_no_part():
    model = chain("none")
    model[7].weight, model[7].bias = model[3].weight, model[3].bias
    assert names_of(model) == ["3"]


def test_layers_that_share_a_weight_but_no_bias_take_no_part():
    model = nn.Sequential(*chain("none")[:7], *chain("none")[3:])
    assert names_of(model) == ["3", "7", "11"]
    model[11].weight = model[3].weight
    assert names_of(model) == ["7"]


def test_select_layers_is_a_pure_function_of_its_arguments():
    convs = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(4, 4, 1), "c": nn.Conv2d(4, 2, 1)}
    trained = {id(p) for c in convs.values() for p in c.parameters()}
    arguments = {
        **{"stems": {"a"}, "heads": {"c"}, "gates": set()},
        **{"trained": trained, "has_backbone": False},
    }
    assert select_layers(convs, **arguments) == ["b"]
    assert select_layers(convs, **arguments, include=["?"]) == ["a", "b", "c"]
    assert select_layers(convs, **arguments, include=["?"], exclude=["b"]) == ["a", "c"]


def test_default_looks_through_wrappers():
    model = Residual()
    model.block1 = DataParallel(model.block1)
    assert names_of(model) == names_of(Residual())
