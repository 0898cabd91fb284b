"""Weights that another layer, module or operation uses as well."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repr_det import RePr, RePrSchedule
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


def orthogonality(m):
    rows = [F.normalize(conv.weight.flatten(1), dim=1) for conv in (m.b, m.c)]
    return sum((r @ r.T).square().sum() - (r @ r.T).diagonal().square().sum() for r in rows)


PENALTIES = {
    "squares": lambda m: sum(p.square().sum() for p in m.parameters()),
    "orthogonality": orthogonality,
    "scale of the norm": lambda m: m.norm.weight.abs().sum(),
    "distance": lambda m: (m.b.weight - torch.ones(8, 1, 1)).norm(),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalty_in_the_loss_is_no_other_user(name):
    """What it takes meets no data, so it has no influence on channels."""
    model, x = Elsewhere(lambda m, x, y: 0.0), images()[0]
    plain = trace(model, lambda: model(x).mean())
    found = trace(model, lambda: model(x).mean() + 0.1 * PENALTIES[name](model))
    assert plain.fixed.keys() == found.fixed.keys() and plain.unsuitable == found.unsuitable
    assert all(torch.equal(mask, found.fixed[key]) for key, mask in plain.fixed.items())
    assert plain.readers.keys() == found.readers.keys()
    for key, reader in plain.readers.items():
        masks = {"a": torch.arange(8) == 1, "b": torch.arange(8) == 2}
        assert torch.equal(reader.dead(masks), found.readers[key].dead(masks))


def scaled(m):
    return F.normalize(m.b.weight.flatten(1), dim=1).view_as(m.b.weight)


def keep(m):
    m.kept = scaled(m)
    return 0.0


def write(m):
    with torch.no_grad():
        m.b.weight.mul_(1.0)
    return 0.0


MEETS = {
    "features": lambda m, x, y: F.conv2d(y, scaled(m)).mean(),
    "images": lambda m, x, y: F.conv2d(x.repeat(1, 3, 1, 1)[:, :8], scaled(m)).mean(),
    "a layer": lambda m, x, y: m.last(scaled(m).view(1, 8, 8, 1)).mean(),
    "a norm": lambda m, x, y: m.norm(scaled(m).view(1, 8, 8, 1)).mean(),
    "later runs": lambda m, x, y: keep(m),
    "something written": lambda m, x, y: write(m),
}


@pytest.mark.parametrize("name", MEETS)
def test_what_is_computed_of_a_weight_and_meets_data_is_another_user(name):
    model, x, one = Elsewhere(lambda m, x, y: 0.0), images()[0], {"a": torch.arange(8) == 1}

    def run():
        return model(x).mean() + MEETS[name](model, x, F.silu(model.a(x)))

    assert trace(model, lambda: model(x).mean()).readers["b"].dead(one).any()
    found = trace(model, run)
    assert not found.readers["b"].dead(one).any()
    assert found.fixed["b"].all()


def test_a_penalty_in_the_loss_trains_as_in_a_smaller_network():
    """The paper's orthogonality loss, with global clipping, given to RePr or not."""

    class Net(nn.Module):
        def __init__(self, first=8, second=8):
            super().__init__()
            self.stem, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, first, 3)
            self.c, self.head = nn.Conv2d(first, second, 3), nn.Linear(second, 2)

        def forward(self, x):
            x = F.silu(self.c(F.silu(self.b(F.silu(self.stem(x))))))
            return self.head(x.mean((2, 3)))

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]) + 0.1 * orthogonality(model)

    batches = [(images(size=8)[0].double() + i, torch.arange(2)) for i in range(10)]
    for given in ({}, {"batches": lambda: iter(batches), "loss": loss}):
        torch.manual_seed(0)
        model = Net().double()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        method = RePr(model, optimizer, RePrSchedule(1, 50, 1), 0.4, **given)
        method.step(1)
        first, second = ~method.pruned["b"], ~method.pruned["c"]
        smaller = Net(int(first.sum()), int(second.sum())).double()
        state = dict(model.state_dict())
        state |= {"b.weight": state["b.weight"][first], "b.bias": state["b.bias"][first]}
        state["c.weight"] = state["c.weight"][second][:, first]
        state |= {"c.bias": state["c.bias"][second], "head.weight": state["head.weight"][:, second]}
        smaller.load_state_dict(state)
        other = torch.optim.SGD(smaller.parameters(), 0.05)
        for i, batch in enumerate(batches):
            method.step(2 + i)
            for network, trainer in ((model, optimizer), (smaller, other)):
                trainer.zero_grad()
                loss(network, batch).backward()
                nn.utils.clip_grad_norm_(network.parameters(), 0.05)
                trainer.step()
        ours = model.c.weight[second][:, first]
        torch.testing.assert_close(ours, smaller.c.weight, rtol=0, atol=1e-12)
        assert not model.c.weight[:, ~first].any()


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
    "power below one": (lambda x: x.sign() * x.abs() ** 0.5, False),
    "power above one": (lambda x: x.abs() ** 1.5, True),
    "negative power": (lambda x: x.square() ** -1, False),
    "logarithm of base two": (lambda x: x.square().log2(), False),
    "hypotenuse": (lambda x: torch.hypot(x, x), False),
    "angle": (lambda x: torch.atan2(x, x), False),
    "divided by its length": (lambda x: x / x.norm(dim=(2, 3), keepdim=True), False),
    "divided by its sum": (lambda x: x / x.sum((2, 3), keepdim=True), False),
    "divided by a length above zero": (lambda x: F.normalize(x, dim=3), True),
    "standardised": (
        lambda x: (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True),
        False,
    ),
    "root of a variance": (lambda x: x * x.var((2, 3), keepdim=True).sqrt(), False),
    "root of what is above zero": (lambda x: x.clamp(min=0) ** 0.5, False),
    "mean of powers": (lambda x: F.lp_pool2d(x, 2, 2), False),
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
    if takes_part:  # with zeros all gradients are numbers
        nn.init.zeros_(model[1].a.weight), nn.init.zeros_(model[1].a.bias)
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


class OwnNorm(nn.Module):
    """A norm that is not written as one: its parameters have names of their own."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.norm = norm
        self.gamma, self.beta = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("variance", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self, x)


NORMS = {
    "batch": (lambda n, x: F.batch_norm(x, n.mean, n.variance, n.gamma, n.beta, n.training), False),
    "batch, statistics alone": (lambda n, x: F.batch_norm(x, n.mean, n.variance), False),
    "batch, no parameters": (lambda n, x: F.batch_norm(x, None, None, training=True), True),
    "group": (lambda n, x: F.group_norm(x, 2, n.gamma, n.beta), False),
    "layer": (
        lambda n, x: F.layer_norm(x.movedim(1, -1), (8,), n.gamma, n.beta).movedim(-1, 1),
        False,
    ),
    "instance": (lambda n, x: F.instance_norm(x, None, None, n.gamma, n.beta), False),
}


@pytest.mark.parametrize("name", NORMS)
def test_conv_before_a_norm_that_is_no_module_takes_no_part(name):
    """Its scale and shift would train on, and its running mean would make a constant of zeros."""
    norm, takes_part = NORMS[name]
    convs = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)]
    model = nn.Sequential(*convs[:2], OwnNorm(norm), *convs[2:])
    assert ("1" in names_of(model)) == takes_part
    assert "3" in names_of(model)


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
