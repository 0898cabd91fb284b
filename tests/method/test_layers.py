"""Where a filter is in its tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from repr_det.method.layers import FilterLayer, column_slots
from repr_det.method.tracing import trace

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
