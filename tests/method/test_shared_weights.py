"""Weights that another layer, module or operation uses as well."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repr_det.errors import UserError
from repr_det.method.tracing import trace
from tests.method.found import Between, dead, images, method_of, names_of


class Elsewhere(nn.Module):
    """A conv that reads the first conv, and whose weight another line of code uses."""

    def __init__(self, use) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm, self.last, self.use = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1), use

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.a(x))
        return self.last(F.silu(self.norm(self.c(self.b(y))))) + self.use(self, x, y)


ELSEWHERE = {
    "functional call": lambda m, x, y: F.conv2d(torch.ones_like(y), m.b.weight).mean(),
    "regulariser": lambda m, x, y: m.b.weight.square().sum(),
    "part": lambda m, x, y: m.b.weight[:, 1].sum(),
    "matrix": lambda m, x, y: (torch.ones(3, 8) @ m.b.weight.flatten(1)).mean(),
    "detached": lambda m, x, y: m.b.weight.detach().mean(),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_weight_with_another_user_has_no_dead_columns(name):
    model = Elsewhere(ELSEWHERE[name])
    assert dead(model, a=[1]) == {}
    graph = trace(model)
    assert graph.fixed["a"].all() and graph.fixed["b"].all()
    assert dead(model, b=[1]) == {"c": [1]}


def test_weight_that_a_module_which_is_no_layer_holds_has_no_dead_columns():
    class Tied(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight_of_another = weight

        def forward(self, x):
            return F.conv2d(torch.ones_like(x), self.weight_of_another).mean()

    model = Elsewhere(lambda m, x, y: m.tied(y))
    model.tied = Tied(model.b.weight)
    assert dead(model, a=[1]) == {}


def test_transposed_conv_that_shares_a_weight_reads_other_columns():
    class AutoEncoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.down = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
            self.up, self.last = nn.ConvTranspose2d(8, 8, 3, padding=1), nn.Conv2d(8, 3, 1)
            self.up.weight, self.up.bias = self.down.weight, self.down.bias

        def forward(self, x):
            return self.last(self.up(F.silu(self.down(self.stem(x)))))

    model = AutoEncoder()
    found = dead(model, stem=[1], down=[2])
    assert "down" not in found and "up" not in found
    # A row of one is a column of the other.
    assert names_of(model, include=["*"]) == ["stem", "last"]


def test_filters_that_share_more_than_a_weight_take_no_part():
    model = nn.Sequential(*(nn.Conv2d(i, 8, 1) for i in (3, 8, 8, 8, 8)), nn.Conv2d(8, 2, 1))
    assert names_of(model) == ["1", "2", "3", "4"]
    model[2].bias = model[1].bias
    assert names_of(model) == ["3", "4"]


def test_layer_whose_norm_has_another_user_takes_no_part():
    model = Elsewhere(lambda m, x, y: 0.0)
    assert "c" in names_of(model)
    model.use = lambda m, x, y: (m.norm.weight.view(1, 8, 1, 1) * y).mean()
    assert "c" not in names_of(model)


class Borrows(nn.Module):
    """Some layers compute with the parameters of others."""

    def __init__(self, borrows: str = "") -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.conv, self.conv2 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.unit, self.unit2, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.borrows = borrows

    def run(self, name: str, x: Tensor) -> Tensor:
        layer = getattr(self, name)
        if name != self.borrows:
            return layer(x)
        lent = dict(getattr(self, f"{name}2").named_parameters())
        return torch.func.functional_call(layer, lent, (x,))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.run("norm", self.run("conv", self.stem(x)))).mean((2, 3))
        return self.head(F.silu(self.unit2(F.silu(self.run("unit", x)))))


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("", ["conv", "unit", "unit2"]),
        ("conv", ["unit", "unit2"]),
        ("norm", ["unit", "unit2"]),
        ("unit", ["conv"]),
    ],
)
def test_layer_with_parameters_of_another_takes_no_part(name, left):
    assert names_of(Borrows(name), images(), linear=True) == left
    model = Borrows()
    if name:
        getattr(model, f"{name}2").weight.data = getattr(model, name).weight.data
    assert names_of(model, images(), linear=True) == left


def test_linear_layer_whose_forward_was_replaced_takes_no_part():
    model = Borrows()
    before = model.unit.forward
    model.unit.forward = lambda x: before(x) + 1
    assert names_of(model, images(), linear=True) == ["conv", "unit2"]


def test_linear_layer_that_holds_anothers_weight_transposed_takes_no_part():
    model = Borrows()
    model.unit2.weight.data = model.unit.weight.data.T
    assert names_of(model, images(), linear=True) == ["conv"]


class TwoUses(nn.Module):
    """A norm after a layer, and what else goes into it."""

    def __init__(self, layer, other) -> None:
        super().__init__()
        self.stem, self.layer, self.norm = nn.Conv2d(3, 8, 1), layer, nn.LayerNorm(8)
        self.first, self.second, self.other = nn.Linear(8, 2), nn.Linear(8, 2), other

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x)).flatten(2).transpose(1, 2)
        y = self.layer(x) if isinstance(self.layer, nn.Linear) else self.layer(x.mT).mT
        return (self.first(self.norm(y)) + self.second(self.norm(self.other(x, y)))).mean(1)


@pytest.mark.parametrize("build", [lambda: nn.Linear(8, 8), lambda: nn.Conv1d(8, 8, 1)])
def test_norm_after_a_layer_and_something_else_hides_the_layer(build):
    """A pruned filter would silence a channel of the other."""
    model = TwoUses(build(), lambda x, y: y * 2)
    assert names_of(model, images(), include=["layer"]) == ["layer"]
    model.other = lambda x, y: x.cumsum(1)
    with pytest.raises(UserError, match="layer cannot"):
        method_of(model, images(), include=["layer"])


class Computed(nn.Conv2d):
    """A conv whose weight or result is computed in a way of its own."""

    def __init__(self, weight=lambda w: w, result=lambda y: y) -> None:
        super().__init__(8, 8, 1)
        self.computed, self.result = weight, result

    def forward(self, x: Tensor) -> Tensor:
        return self.result(F.conv2d(x, self.computed(self.weight), self.bias))


COMPUTED = {
    "centred in each filter": (lambda w: w - w.mean((1, 2, 3), keepdim=True), None, True),
    "centred over filters": (lambda w: w - w.mean(0, keepdim=True), None, False),
    "softmax of the weight": (lambda w: w.softmax(1), None, False),
    "sign of the weight": (torch.sign, None, True),
    "shifted result": (None, lambda y: y + 0.1, False),
    "scaled result": (None, lambda y: 2 * y, True),
    "sigmoid of the result": (None, torch.sigmoid, False),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_conv_takes_part_only_if_zero_weights_make_zeros(name):
    weight, result, takes_part = COMPUTED[name]
    given = {"weight": weight, "result": result}
    conv = Computed(**{key: value for key, value in given.items() if value is not None})
    model = nn.Sequential(nn.Conv2d(3, 8, 1), conv, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    before = copy.deepcopy(model.state_dict())
    assert ("1" in names_of(model)) == takes_part
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


ROOTS = {
    "root of a mean square": (lambda x: x.square().mean((2, 3), keepdim=True).sqrt(), False),
    "inverse root": (lambda x: x * x.square().mean((2, 3), keepdim=True).rsqrt(), False),
    "logarithm": (lambda x: x.abs().log(), False),
    "reciprocal": (lambda x: x.reciprocal(), False),
    "root of more than zero": (lambda x: (x.square() + 1e-6).sqrt(), True),
}


@pytest.mark.parametrize("name", ROOTS)
def test_conv_before_what_is_infinite_at_zero_takes_no_part(name):
    """All gradients before it would be NaN."""
    operation, takes_part = ROOTS[name]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Between(operation), nn.Conv2d(8, 2, 1))
    model[1].a, model[1].b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    assert ("1.a" in names_of(model)) == takes_part
    assert "1.b" in names_of(model)


class Shifted(nn.Conv2d):
    """A conv with a shift that is zero until it trains."""

    def __init__(self, *shape: int) -> None:
        super().__init__(8, 8, 1)
        self.shift = nn.Parameter(torch.zeros(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


def test_conv_that_is_silent_until_a_shift_trains_takes_no_part():
    for shape, takes_part in (((8, 1, 1), True), ((1, 8, 1, 1), False), ((1,), False)):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), Shifted(*shape), *[nn.Conv2d(8, 8, 1)] * 2)
        assert ("1" in names_of(model)) == takes_part
