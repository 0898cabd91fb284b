"""Which filters can go: what is tied, what is fixed, and how many of a group."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from repr_det.method.removal import Removable
from repr_det.method.tracing import trace
from tests.method.nets import PreActivation, Residual, chain


def chosen(model, pruned, multiple=1):
    """Indices of the filters that go, by layer, and of the inputs."""
    graph = trace(model)
    masks = {}
    for name, filters in pruned.items():
        masks[name] = torch.zeros(graph.convs[name].out_channels, dtype=torch.bool)
        masks[name][filters] = True
    removal = Removable(graph).choose(masks, multiple)
    return tuple(
        {name: mask.nonzero().flatten().tolist() for name, mask in part.items()} for part in removal
    )


def test_chain():
    filters, inputs, norms = chosen(chain(), {"0": [1, 5], "7": [2]})
    assert filters == {"0": [1, 5], "7": [2]}
    assert inputs == {"3": [1, 5], "12": [8, 9, 10, 11]}
    assert norms == {"1": [1, 5], "8": [2]}


def test_inside_a_bottleneck_and_not_in_the_sum():
    filters, inputs, norms = chosen(Residual(), {"block2.conv1": [0], "block2.conv3": [3]})
    assert filters == {"block2.conv1": [0]}
    assert inputs == {"block2.conv2": [0]}
    assert norms == {"block2.norm1": [0]}


def test_sum_goes_only_as_a_whole():
    parties = ["block1.conv3", "block1.shortcut", "block2.conv3"]
    assert chosen(Residual(), {name: [3] for name in parties[:2]})[0] == {}
    filters, inputs, norms = chosen(Residual(), {name: [3] for name in parties})
    assert filters == {name: [3] for name in parties}
    assert inputs == {name: [3] for name in ("block2.conv1", "down", "lateral1")}
    assert norms == {"block1.norm3": [3], "block2.norm3": [3]}
    # The top-down sum of the pyramid.
    assert chosen(Residual(), {"lateral2": [1]})[0] == {}
    assert chosen(Residual(), {"lateral1": [1], "lateral2": [1]})[1] == {"output": [1]}


def test_channels_that_two_groups_read():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.grouped, self.head = nn.Conv2d(8, 4, 1, groups=2), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.conv(F.relu(self.stem(x)))
            return self.head(F.relu(self.grouped(torch.cat([x, x], 1))))

    filters, inputs, _ = chosen(Twice(), {"conv": [1]})
    assert filters == {"conv": [1]}
    assert inputs == {"grouped": [1, 5]}


def test_groups_lose_equally_many():
    model = Residual(groups=3)  # conv2: 3 groups of 2 filters and 2 inputs
    assert chosen(model, {"block1.conv1": [0, 2]})[0] == {}
    filters, inputs, _ = chosen(model, {"block1.conv1": [0, 1, 2, 5]})
    assert filters == {"block1.conv1": [0, 2, 5]}
    assert inputs == {"block1.conv2": [0, 2, 5]}
    assert chosen(model, {"block1.conv2": [1, 2, 4]})[0] == {"block1.conv2": [1, 2, 4]}
    assert chosen(model, {"block1.conv2": [1, 2]})[0] == {}


def test_what_stays_is_a_multiple():
    assert chosen(chain(), {"0": [1, 5, 6]}, multiple=4)[0] == {}
    assert chosen(chain(), {"0": [1, 5, 6]}, multiple=2)[0] == {"0": [1, 5]}
    assert chosen(chain(), {"0": [1, 3, 5, 6]}, multiple=4)[0] == {"0": [1, 3, 5, 6]}


def test_dense_block():
    filters, inputs, norms = chosen(PreActivation(), {"convs.0": [1]})
    assert filters == {"convs.0": [1]}
    assert inputs == {"convs.1": [7], "convs.2": [7], "linear": [7]}
    assert norms == {"norms.1": [7], "norms.2": [7], "norms.3": [7]}


class Between(nn.Module):
    """Two convs with something between them, which may have parts of its own."""

    def __init__(self, operation=lambda self, x: x, **parts):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(4, 2, 1)
        for name, part in parts.items():
            setattr(self, name, part)
        self.operation = operation

    def forward(self, x):
        return self.last(self.b(self.operation(self, self.a(x))))


def test_plain_operations_let_filters_go():
    for operation in (
        lambda _, x: F.max_pool2d(F.relu(x), 2),
        lambda _, x: 2 * x,
        lambda _, x: x + F.silu(x),
        lambda _, x: F.pad(x, (1, 1)),
    ):
        assert chosen(Between(operation), {"a": [1]})[1] == {"b": [1]}


@pytest.mark.parametrize(
    "operation",
    [
        lambda m, x: x * torch.sigmoid(x),  # not known to keep zeros
        lambda m, x: x + torch.zeros_like(x),
        lambda m, x: F.dropout(x, 0.5, training=m.training),
        lambda m, x: F.dropout2d(x, 0.5, training=m.training),
        lambda m, x: x.flip(1),
        lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1),
        lambda m, x: torch.cat([x[:, 1:], x[:, :1]], 1),
        lambda m, x: x.view(len(x), 2, 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
        lambda m, x: x * (1 + 0 * x.sum()),
        lambda m, x: F.conv2d(x, m.b.weight),
        lambda m, x: x * (1 + 0 * m.a.weight.sum()),
        lambda m, x: F.conv2d(x, m.b.weight - m.b.weight.mean(1, keepdim=True)),
    ],
)
def test_operations_that_are_not_known_keep_filters(operation):
    assert chosen(Between(operation), {"a": [1]}) == ({}, {}, {})


@pytest.mark.parametrize(
    ("operation", "part"),
    [
        (lambda m, x: x * m.part, lambda: nn.Parameter(torch.ones(4, 1, 1))),
        (lambda m, x: x / m.part, lambda: nn.Parameter(torch.ones(4, 1, 1))),
        (lambda m, x: m.part(x), lambda: nn.GroupNorm(2, 4)),
        (lambda m, x: m.part(x), lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4)),
    ],
)
def test_parts_that_know_the_number_of_channels_keep_filters(operation, part):
    assert chosen(Between(operation, part=part()), {"a": [1]}) == ({}, {}, {})


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 4, 1) for i in (3, 4, 4))
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        y = self.a(x)
        return {"map": self.b(y), "out": self.last(self.c(y))}


def test_outputs_and_prediction_layers_keep_their_filters():
    model = Branches()
    assert chosen(model, {"a": [1]})[1] == {"b": [1], "c": [1]}
    assert chosen(model, {"b": [1], "last": [0]}) == ({}, {}, {})


def test_shared_weight_keeps_its_rows_and_columns():
    model = Branches()
    model.c.weight = model.b.weight
    assert chosen(model, {"a": [1], "c": [2]}) == ({}, {}, {})


def test_layer_that_runs_on_several_inputs_ties_them():
    class Levels(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
            self.head, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return [self.last(F.relu(self.head(level(x)))) for level in (self.a, self.b)]

    assert chosen(Levels(), {"a": [1]}) == ({}, {}, {})
    assert chosen(Levels(), {"a": [1], "b": [1], "head": [0]})[:2] == (
        {"a": [1], "b": [1], "head": [0]}, {"head": [1], "last": [0]}
    )  # fmt: skip


def test_weight_that_is_standardised_stays():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Standardised(4, 4, 1), nn.Conv2d(4, 2, 1))
    assert chosen(model, {"0": [1], "1": [1]}) == ({}, {}, {})


def test_run_on_a_batch_shows_what_no_example_reaches():
    """A loss on a feature map that only training computes."""
    model = chain()
    features = []
    model[2].register_forward_hook(lambda m, a, out: features.append(out))

    def run():
        features.clear()
        model(torch.randn(2, 3, 8, 8))
        return features[0].square().mean()

    graph = trace(model, run)
    pruned = {"0": torch.arange(8) == 1, "3": torch.arange(8) == 2}
    removal = Removable(graph).choose(pruned)
    assert list(removal.filters) == ["3"]
