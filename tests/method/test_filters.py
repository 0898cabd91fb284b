"""What: names, patterns, layers that take part, and where a filter lies in its tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from repr_det import RePr, RePrSchedule
from repr_det.method.layers import FilterLayer, column_slots
from repr_det.method.modules import is_conv, is_norm, mixes_channels, named_modules, unwrap
from repr_det.method.selection import matches, select_layers
from repr_det.method.tracing import trace
from tests.method.nets import Residual, chain


def compiled(module):
    return torch.compile(module, backend="eager")


def method_of(model, **arguments):
    return RePr(model, torch.optim.SGD(model.parameters(), 0.1), RePrSchedule(1, 1, 1), **arguments)


def names_of(model, **arguments):
    return [layer.name for layer in method_of(model, **arguments).layers]


# --- names


@pytest.mark.parametrize("wrap", [DataParallel, compiled, lambda m: DataParallel(compiled(m))])
def test_names_look_through_wrappers(wrap):
    plain = Residual()
    expected = [name for name, _ in plain.named_modules()]
    assert unwrap(wrap(plain)) is plain
    assert [name for name, _ in named_modules(wrap(plain))] == expected
    # Wrapped below the top as well.
    plain.block1 = wrap(plain.block1)
    found = [name for name, _ in named_modules(plain)]
    assert found == expected
    assert not any("module." in name or "_orig_mod" in name for name in found)
    assert names_of(plain) == names_of(Residual())


def test_a_module_called_module_keeps_its_name():
    model = nn.Sequential()
    model.add_module("module", nn.Conv2d(3, 4, 1))
    assert [name for name, _ in named_modules(model)] == ["", "module"]


def test_module_used_twice_has_its_first_name():
    shared = nn.Conv2d(3, 3, 1)
    assert [n for n, _ in named_modules(nn.Sequential(shared, nn.ReLU(), shared))] == ["", "0", "1"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("backbone", True), ("backbone.fpn*", True), ("*.lateral", False), ("back*", True),
        ("backbone.fpn.lateral2", True), ("fpn", False), ("*lateral?", True), ("bone", False),
    ],
)  # fmt: skip
def test_patterns_take_what_lies_below(pattern, expected):
    assert matches("backbone.fpn.lateral2", [pattern]) is expected


# --- which layers take part


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
    with pytest.raises(ValueError, match="all 2 matching conv layers are depthwise or have a sing"):
        method_of(depthwise(), include=["1", "2"])


def test_frozen_layers_and_layers_outside_the_optimizer_take_no_part():
    model = chain()
    model[3].weight.requires_grad_(False)
    assert names_of(model) == ["7"]
    model = chain()
    optimizer = torch.optim.SGD(
        [p for n, p in model.named_parameters() if not n.startswith("7")], 1
    )
    assert [x.name for x in RePr(model, optimizer, RePrSchedule(1, 1, 1)).layers] == ["3"]
    with pytest.raises(ValueError, match="of the 1 conv layers that match, none has a weight"):
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


# --- kinds of modules


def test_what_is_a_conv_and_what_a_norm():
    from torchvision.ops import DeformConv2d
    from torchvision.ops.misc import FrozenBatchNorm2d

    convs = [
        nn.Conv1d(1, 1, 1),
        nn.Conv3d(1, 1, 1),
        nn.ConvTranspose2d(1, 1, 1),
        DeformConv2d(1, 1, 1),
    ]
    norms = [
        nn.BatchNorm2d(2), nn.SyncBatchNorm(2), nn.InstanceNorm2d(2),
        nn.BatchNorm2d(2, affine=False), nn.GroupNorm(1, 2), nn.LayerNorm(2), FrozenBatchNorm2d(2),
    ]  # fmt: skip
    neither = [nn.Linear(1, 1), nn.PReLU(2), nn.Embedding(2, 2), nn.ReLU()]
    assert all(is_conv(m) and not is_norm(m) for m in convs)
    assert all(is_norm(m) and not is_conv(m) for m in norms)
    assert not any(is_conv(m) or is_norm(m) for m in neither)
    assert [mixes_channels(m) for m in norms] == [False] * 4 + [True] * 2 + [False]


# --- where a filter lies


CONVS = {
    "plain": lambda: nn.Conv2d(6, 4, 3),
    "grouped": lambda: nn.Conv2d(6, 4, 3, groups=2),
    "1d": lambda: nn.Conv1d(6, 4, 5),
    "3d": lambda: nn.Conv3d(6, 4, 2),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 3),
    "transposed grouped": lambda: nn.ConvTranspose2d(6, 4, (2, 3), groups=2),
    "transposed 1d": lambda: nn.ConvTranspose1d(6, 4, 3, groups=2),
    "channels last": lambda: nn.Conv2d(6, 4, 3).to(memory_format=torch.channels_last),
}


def example(conv):
    return torch.randn(2, 6, *[5] * (conv.weight.dim() - 2))


@pytest.mark.parametrize("kind", CONVS)
def test_row_of_the_matrix_is_what_its_output_channel_depends_on(kind):
    """Found by autograd: the entries of the weight with a gradient from that channel."""
    conv = CONVS[kind]()
    layer = FilterLayer("conv", conv)
    x = example(conv).abs() + 1
    index = torch.arange(conv.weight.numel()).reshape(conv.weight.shape)
    for channel in range(4):
        (gradient,) = torch.autograd.grad(conv(x)[:, channel].sum(), conv.weight)
        expected = set(index[gradient != 0].tolist())
        assert set(layer.matrix(index)[channel].tolist()) == expected
        assert layer.dimension == len(expected)
        chosen = torch.arange(4) == channel
        marked = torch.zeros_like(conv.weight)
        for slot in layer.weight_slots(chosen):
            slot.fill(1.0, like=marked)
        assert set(index[marked != 0].tolist()) == expected


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("chosen", [[1, 0, 0, 1], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
def test_written_rows_are_read_back(kind, chosen):
    conv = CONVS[kind]()
    layer = FilterLayer("conv", conv)
    chosen = torch.tensor(chosen, dtype=torch.bool)
    before, strides = layer.matrix().clone(), conv.weight.stride()
    rows = torch.randn(int(chosen.sum()), layer.dimension)
    layer.write_rows(chosen, rows)
    assert torch.equal(layer.matrix()[chosen], rows)
    assert torch.equal(layer.matrix()[~chosen], before[~chosen])
    assert conv.weight.stride() == strides
    other = torch.zeros_like(conv.weight)
    layer.write_rows(chosen, rows, other)
    assert torch.equal(layer.matrix(other)[chosen], rows)
    assert layer.matrix(other)[~chosen].abs().sum() == 0


@pytest.mark.parametrize("kind", CONVS)
def test_columns_are_what_an_input_channel_meets(kind):
    """Found by autograd: the entries of the weight whose gradient needs that input channel."""
    conv = CONVS[kind]()
    index = torch.arange(conv.weight.numel()).reshape(conv.weight.shape)
    for channel in range(6):
        x = torch.zeros_like(example(conv))
        x[:, channel] = 1
        (gradient,) = torch.autograd.grad(conv(x).sum(), conv.weight)
        marked = torch.zeros_like(conv.weight)
        for slot in column_slots(conv, torch.arange(6) == channel):
            slot.fill(1.0, like=marked)
        assert set(index[marked != 0].tolist()) == set(index[gradient != 0].tolist())
    assert column_slots(conv, torch.zeros(6, dtype=torch.bool)) == []


def test_columns_of_a_linear_layer():
    linear = nn.Linear(5, 3)
    (slot,) = column_slots(linear, torch.tensor([0, 1, 0, 0, 1], dtype=torch.bool))
    assert torch.equal(slot.read(), linear.weight[:, [1, 4]])
    slot.write(torch.full((3, 2), 7.0))
    assert (linear.weight[:, [1, 4]] == 7).all()
    assert (linear.weight[:, [0, 2, 3]] != 7).all()


def test_filter_slots_are_weight_bias_gamma_and_beta():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    graph = trace(model)
    layer = FilterLayer("1", model[1], tuple(graph.norms["1"]))
    chosen = torch.tensor([False, True, False, True])
    slots = layer.filter_slots(chosen)
    assert [id(s.tensor) for s in slots] == [
        id(t) for t in (model[1].weight, model[1].bias, model[2].weight, model[2].bias)
    ]
    for slot in slots:
        slot.fill(0.0)
    out = model(torch.randn(2, 3, 4, 4))
    assert out[:, chosen].abs().sum() == 0
    assert (out[:, ~chosen] != 0).any()
