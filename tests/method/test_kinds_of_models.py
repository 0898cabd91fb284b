"""Models that are followed wrongly without care: each holds what its kind must not break."""

from __future__ import annotations

import copy
import re
import warnings
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repr_det import RePr, RePrSchedule
from repr_det.method.compact import Compact
from repr_det.method.modules import unchanged
from repr_det.method.tracing import trace
from tests.method.found import Between, Pooled, dead, images, method_of, names_of
from tests.method.nets import loss

# --- what did not run


class Rare(nn.Module):
    """Parts that only bright batches reach, and which read what the rest reads."""

    def __init__(self, rare: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.SiLU()
        )
        self.head, self.rare = nn.Linear(8, 4), rare

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        if x.mean() > 0.5:
            features = features + self.rare(features)
        return self.head(features.mean((2, 3)))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


RARE = {
    "conv": lambda: nn.Conv2d(8, 8, 1),
    "linear": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(8, 1),
                                    nn.Unflatten(1, (1, 1, 1))),
    "norm": lambda: nn.BatchNorm2d(8),
    "norm without weights": lambda: nn.BatchNorm2d(8, affine=False),
    "bare parameter": Scale,
    "slope for each channel": lambda: nn.PReLU(8),
    "conv of two maps": lambda: nn.Sequential(nn.Unfold(1), nn.Unflatten(2, (8, 8)),
                                              nn.Conv2d(8, 1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("rare", RARE)
def test_what_did_not_run_keeps_every_filter(rare):
    torch.manual_seed(0)
    model = Rare(RARE[rare]())
    method = method_of(model, images())
    assert method.graph.not_run
    compact = Compact(method)
    method.step(1)
    with pytest.warns(UserWarning, match="rare.* did not run .* none is removed"):
        assert compact.shrink().removed == 0
    loss(model, images(brightness=2.0)).backward()
    compact.grow()
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        compact.shrink()


def test_what_ran_in_some_run_keeps_nothing():
    torch.manual_seed(0)
    method = method_of(Rare(nn.Conv2d(8, 8, 1)), images(brightness=2.0))
    assert method.graph.not_run == []
    pruned = {"body.0": torch.arange(8) == 1}
    assert method.removable.choose(pruned).filters.keys() == {"body.0"}


def test_resumed_run_follows_the_batch_of_the_first():
    torch.manual_seed(0)
    first = method_of(Rare(nn.Conv2d(8, 8, 1)), images())
    first.step(1)
    state = copy.deepcopy(first.state_dict())
    resumed = method_of(Rare(nn.Conv2d(8, 8, 1)), images(brightness=2.0))
    assert resumed.graph.not_run == []
    resumed.load_state_dict(state)
    assert resumed.graph.not_run == ["rare.bias", "rare.weight"]
    assert resumed.removable.choose(resumed.pruned).filters == {}
    for mine, theirs in zip(resumed.layers, first.layers, strict=True):
        assert mine.module is dict(resumed.model.named_modules())[theirs.name]
    kept = _plain(state["graph"])
    assert kept == _plain(resumed.state_dict()["graph"])


def _plain(value):
    """A value of tensors, numbers, strings, lists and dicts, with lists for tensors."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    assert isinstance(value, (Tensor, int, float, str))
    return value.tolist() if isinstance(value, Tensor) else value


class Evaluates(nn.Module):
    """Takes a dict, which no example is, and reads a conv by one more layer in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1)
        self.head, self.other = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        x = F.silu(self.conv(self.stem(data["x"]))).mean((2, 3))
        return self.head(x) if self.training else self.head(x) + self.other(x)


def test_batch_is_followed_in_evaluation_where_no_example_works():
    model = Evaluates()
    graph = trace(model, lambda: model({"x": images()[0]}))
    assert graph.not_run == [] and "conv" in graph.readers["other"].filters


# --- operations that mix channels and keep the shape


def last(operation):
    """An operation on a view in which the last dimension counts channels."""
    return lambda x: operation(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


MIXING = {
    "max_pool3d": lambda x: F.max_pool3d(x, 3, 1, 1),
    "avg_pool3d": lambda x: F.avg_pool3d(x.unsqueeze(1), 3, 1, 1).squeeze(1),
    "max_pool2d of channels last": last(lambda x: F.max_pool2d(x, 3, 1, 1)),
    "avg_pool2d of channels last": last(lambda x: F.avg_pool2d(x, 3, 1, 1)),
    "max_pool1d of tokens": lambda x: F.max_pool1d(
        x.flatten(2).transpose(1, 2), 3, 1, 1).transpose(1, 2).view(x.shape),
    "interpolation of channels last": last(
        lambda x: F.interpolate(F.interpolate(x, scale_factor=2.0), size=x.shape[2:])),
    "adaptive pooling of channels last": last(lambda x: F.adaptive_max_pool2d(x, x.shape[2:])),
    "padding of channels last": last(lambda x: F.pad(x, (1, 1, 0, 0), mode="reflect")[..., :-2]),
    "unbatched pooling": lambda x: torch.stack(
        [F.max_pool2d(one.permute(1, 2, 0), 3, 1, 1).permute(2, 0, 1) for one in x]),
    "grid_sample of channels last": last(
        lambda x: F.grid_sample(x, torch.zeros(len(x), *x.shape[2:], 2), align_corners=False)),
    "fixed conv3d": lambda x: F.conv3d(
        x.unsqueeze(1), torch.ones(1, 1, 3, 3, 3), padding=1).squeeze(1),
    "fixed conv2d of channels last": last(
        lambda x: F.conv2d(x, torch.ones(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1])),
    "cumsum": lambda x: x.cumsum(1),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "roll by a negative dimension": lambda x: x.roll(1, -3),
    "sort": lambda x: x.sort(1).values,
    "softmax": lambda x: x.softmax(-3),
    "layer_norm": last(lambda x: F.layer_norm(x, x.shape[-1:], bias=torch.ones(8))),
    "matmul": last(lambda x: x @ torch.ones(8, 8)),
    "threshold above zero": lambda x: F.hardtanh(x, 0.5, 1.0),
    "permuted places": lambda x: x[:, torch.arange(7, -1, -1)],
    "written over": lambda x: x.clone().fill_(1.0),
    "written over in part": lambda x: x.clone().index_fill_(1, torch.arange(2), 1.0),
    "written over from a list": lambda x: torch._foreach_add([x], 1.0)[0],
    "written over in a list": lambda x: (y := x.clone(), torch._foreach_add_([y], 1.0))[0],
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_channels_hides_them(name):
    model = Between(MIXING[name])
    assert dead(model, a=[2]) == {}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_channels_is_not_removed_silently(name):
    model = Between(MIXING[name])
    graph = trace(model)
    assert graph.fixed["a"].all()


def test_norm_over_another_dimension_of_the_same_length_is_not_linked():
    """Found by running it where only one dimension has this length."""
    model = Between(lambda x: model.norm(x.transpose(1, 2)).transpose(1, 2))
    model.norm = nn.BatchNorm2d(8)
    graph = trace(model, lambda: model(torch.randn(2, 3, 8, 8)))
    assert graph.norms == {}
    model = Between(lambda x: model.norm(x))
    model.norm = nn.BatchNorm2d(8)
    graph = trace(model, lambda: model(torch.randn(2, 3, 8, 8)))
    assert [link.name for link in graph.norms["a"]] == ["norm"]


class Unbatched(nn.Module):
    """A model of single images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.c(F.silu(self.b(F.max_pool2d(self.a(one), 2)))) for one in x])


def test_unbatched_inputs_are_followed():
    model = Unbatched()
    assert dead(model, a=[1]) == {"b": [1]}
    assert not trace(model).fixed["a"].any()


# --- keyword arguments


class Keywords(nn.Module):
    """Calls its layers with keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.layer_norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm(input=self.a(input=x)))
        y = self.layer_norm(input=self.b(input=y).mean((2, 3)))
        return self.head(input=y)


def test_keyword_arguments_are_followed():
    model = Keywords()
    graph = trace(model)
    assert [link.name for link in graph.norms["a"]] == ["norm"]
    assert [link.name for link in graph.norms["b"]] == ["layer_norm"]
    assert dead(model, a=[1], b=[2]) == {"b": [1], "head": [2]}
    assert graph.stems == {"a"} and graph.heads == set()


# --- prediction layers


class Block(nn.Module):
    """Two convs in a module that owns a parameter of two or more dimensions."""

    def __init__(self, use, *shape: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.table, self.use = nn.Parameter(torch.ones(shape)), use

    def forward(self, x: Tensor) -> Tensor:
        return x + self.use(self.second(F.silu(self.first(x))), self.table)


class Mixture(nn.Module):
    """Chooses among weights by the input, as CondConv does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.routing = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.weights = nn.Parameter(torch.randn(4, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        chosen = self.routing(x.mean((0, 2, 3))).sigmoid() @ self.weights
        return F.conv2d(x, chosen.view(8, 8, 1, 1))


BLOCKS = {
    "layer scale": (lambda: Block(lambda x, t: x * t, 8, 1, 1), "second"),
    "position table": (lambda: Block(lambda x, t: x + t, 8, 1, 1), "second"),
    "attention bias": (
        lambda: Block(lambda x, t: x.flatten(2).softmax(-1).view(x.shape) * t.sum(), 2, 2),
        "first",
    ),
    "weights of experts": (Mixture, "inner"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_last_conv_of_a_module_with_parameters_is_no_prediction_layer(name):
    build, inner = BLOCKS[name]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), build(), nn.Conv2d(8, 2, 1))
    graph = trace(model)
    assert graph.heads == {"2"} and graph.stems == {"0"}
    assert f"1.{inner}" in names_of(model)


def test_conv_before_a_product_with_a_weight_is_no_prediction_layer():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.weight = nn.Parameter(torch.randn(8, 4))

        def forward(self, x):
            return F.silu(self.body(self.stem(x))).mean((2, 3)) @ self.weight

    graph = trace(Bare())
    assert graph.heads == set()


# --- leaving the model unchanged


class Restless(nn.Module):
    """Changes all it can in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("minimum", torch.tensor([]))
        self.register_buffer("later", None)
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.weight = nn.Parameter(torch.ones(3))
        self.plain, self.pair = torch.zeros(2), (torch.zeros(1), 1)
        self.count, self.ready, self.name, self.nothing = 0, False, "before", None
        self.seen, self.table, self.recent = [1], {"a": [torch.zeros(1)]}, deque([1], maxlen=2)
        self.kinds, self.state = {1}, SimpleNamespace(step=0, sums=[0])
        self.removed = 5

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + x.mean() + 1
        self.minimum.resize_(3).fill_(1.0)
        self.later = torch.ones(2)
        self.passing += 1
        with torch.no_grad():
            self.weight.mul_(2)
        self.plain.add_(1)
        self.pair[0].add_(1)
        self.count, self.ready, self.name, self.nothing = 1, True, "after", 3
        self.seen.append(2)
        self.table["a"][0].add_(1)
        self.table["b"] = 1
        self.recent.append(2)
        self.kinds.add(2)
        self.state.step += 1
        self.state.sums.append(1)
        del self.removed
        self.added, self.module_added = torch.ones(1), nn.Linear(1, 1)
        self.register_buffer("buffer_added", torch.ones(1))
        self.register_forward_hook(lambda *_: None)
        return x - self.mean


def contents(module):
    """All that a module holds: identities, and values as text."""
    parts = {**module._buffers, **module._parameters, **vars(module)}
    skipped = {"_buffers", "_parameters", "_modules"}
    return (
        {key: id(value) for key, value in parts.items()},
        {key: repr(value) for key, value in parts.items() if key not in skipped},
        list(module._modules), sorted(module.state_dict()),
    )  # fmt: skip


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_unchanged(fails):
    model = nn.Sequential(Restless(), nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 2, 1)))
    before = [contents(module) for module in model.modules()]
    random = torch.get_rng_state()
    try:
        with unchanged(model):
            model.eval()
            model(torch.randn(1, 3, 2, 2))
            if fails:
                raise KeyError("a bug")
    except KeyError:
        assert fails
    assert [contents(module) for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), random)


def test_trace_leaves_a_running_mean_unchanged():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Restless(), nn.Conv2d(4, 2, 1))
    buffer = model[1].mean
    trace(model)
    assert model[1].mean is buffer and buffer == 0


# --- examples


class Records(nn.Module):
    """A network of two convs that notes what it is given."""

    def __init__(self, dims: int, size: int | None = None, accepts=lambda x, training: True):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.a, self.b, self.c = conv(1, 4, 1), conv(4, 4, 1), conv(4, 2, 1)
        self.accepts = accepts
        self.given = []

    def forward(self, x: Tensor) -> Tensor:
        GIVEN.append((self.training, tuple(x.shape)))
        if not self.accepts(x, self.training):
            raise RuntimeError("does not fit")
        return self.c(self.b(self.a(x))).flatten(2).mean(2)


GIVEN: list[tuple[bool, tuple[int, ...]]] = []


def test_given_batch_is_followed_first():
    GIVEN.clear()
    model = Records(3, accepts=lambda x, training: x.shape[2:] == (3, 4, 5))
    data = torch.randn(2, 1, 3, 4, 5), torch.tensor([0, 1])
    assert names_of(model, data) == ["b"]
    assert GIVEN[0] == (True, (2, 1, 3, 4, 5))
    # The example in evaluation mode is of the batch's size.
    assert (False, (2, 1, 3, 4, 5)) in GIVEN
    assert len(GIVEN) < 5


def test_examples_are_bounded():
    GIVEN.clear()
    with pytest.raises(ValueError, match="could not run Records on an example image"):
        trace(Records(3, accepts=lambda x, training: False))
    sizes = [torch.Size(shape).numel() for _, shape in GIVEN]
    assert max(sizes) <= 2**21
    assert (False, (2, 1, 64, 64, 64)) in GIVEN


def test_example_that_runs_only_in_evaluation_does_not_end_the_search():
    accepts = lambda x, training: x.shape[-1] in ((32,) if training else (64, 32))  # noqa: E731
    GIVEN.clear()
    graph = trace(Records(2, accepts=accepts))
    assert graph.convs.keys() == {"a", "b", "c"}
    assert (True, (2, 1, 32, 32)) in GIVEN
    assert trace(Records(2, accepts=lambda x, training: not training)).convs


# --- gates and parts of filters


class Selective(nn.Module):
    """Two branches weighted by a softmax over them (selective kernels), or by something else."""

    def __init__(self, gate) -> None:
        super().__init__()
        self.stem, self.gate = nn.Conv2d(3, 8, 1), gate
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.squeeze, self.select = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 16, 1)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        branches = torch.stack([self.a(x), self.b(x)], 1)
        logits = self.select(self.squeeze(branches.sum(1).mean((2, 3), keepdim=True)))
        weights = self.gate(logits.view(len(x), 2, 8, 1, 1))
        return self.last((branches * weights).sum(1))


GATES = {
    "softmax": lambda x: x.softmax(1),
    "split attention": lambda x: x.transpose(1, 2).softmax(2).transpose(1, 2),
    "sigmoid": lambda x: x.sigmoid(),
    "hardsigmoid": F.hardsigmoid,
    "log_softmax": lambda x: x.log_softmax(1).exp(),
    "one plus": lambda x: 1 + x,
    "one minus": lambda x: 1 - x,
    "exp": lambda x: x.exp(),
    "softplus": F.softplus,
    "scaled sigmoid": lambda x: 2 * (x / 3).sigmoid(),
}


@pytest.mark.parametrize("name", GATES)
def test_gates_take_no_part(name):
    assert trace(Selective(GATES[name])).gates == {"select"}


def test_gate_that_keeps_zero_takes_part():
    assert trace(Selective(torch.tanh)).gates == set()


def test_gated_linear_unit_is_a_gate_in_half_of_its_filters():
    assert trace(Between(lambda x: x * x.sigmoid())).gates == set()
    for unit in (
        lambda x: F.glu(x, 1),
        lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid(),
    ):
        assert trace(Between(lambda x, f=unit: torch.cat([f(x)] * 2, 1))).gates == {"a"}


class ScaledConv(nn.Conv2d):
    """A weight-standardised conv with a gain for each filter."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None,
            self.gain.view(-1), training=True,
        ).reshape_as(self.weight)  # fmt: skip
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class InputGain(nn.Conv2d):
    """A gain for each input channel, as many as there are filters."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(self.in_channels))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.gain[:, None, None])


@pytest.mark.parametrize(("kind", "names"), [(InputGain, ["2"]), (ScaledConv, ["1", "2"])])
def test_parameters_are_of_filters_only_if_no_other_filter_reads_them(kind, names):
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 1), kind(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.SiLU()), Pooled(8)
    )
    found = names_of(model)
    assert found == [{"2": "3"}.get(name, name) for name in names]


class RootMeanSquare(nn.Module):
    """A norm with a weight and no bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(channels) + 0.5), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        scale = (x.square().mean(1, keepdim=True) + self.eps).rsqrt()
        return x * scale * self.weight[:, None, None]


@pytest.mark.parametrize("kind", ["gain", "norm"])
def test_gain_and_norm_without_bias_are_part_of_a_filter(kind):
    torch.manual_seed(0)
    if kind == "gain":
        model = nn.Sequential(nn.Conv2d(3, 8, 1), ScaledConv(8, 8, 3), nn.SiLU(), Pooled(8))
        part = model[1].gain
    else:
        model = nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), RootMeanSquare(8), nn.SiLU(), Pooled(8)
        )
        part = model[2].weight
    method = method_of(model, images())
    first = part.detach().clone()
    for i in range(4):
        method.step(i)
        pruned = method.pruned["1"]
        assert torch.equal(part.flatten() == 0, pruned)
        method.optimizer.zero_grad()
        loss(model, images()).backward()
        method.optimizer.step()
    assert pruned.any()
    survivors = part[~pruned].detach()
    method.step(10)
    torch.testing.assert_close(part[pruned], survivors.mean().expand_as(part[pruned]))
    assert not torch.equal(part, first)
    assert not method.optimizer.state[part]["momentum_buffer"][pruned].any()


def test_lazy_layers_are_refused():
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.SiLU(), nn.LazyConv2d(8, 3))
    with pytest.raises(ValueError, match="lazy layers without weights. Run it on a batch first"):
        method_of(model)


class Named(nn.Module):
    """Takes its images by a name, which no example knows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(2)
        )
        self.net(torch.zeros(1, 3, 8, 8))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["left"])


@pytest.mark.parametrize(
    ("batches", "kind", "sentence"),
    [
        ([], ValueError, "batches() yields nothing. Pass batches= that yields training batches."),
        ([{"right": 0}], RuntimeError, "on a training batch (KeyError: 'left')."),
    ],
)
def test_batches_that_cannot_be_run_are_named(batches, kind, sentence):
    model = Named()
    trainer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(kind, match=re.escape(sentence)):
        RePr(
            model, trainer, RePrSchedule(1, 9, 1),
            batches=lambda: iter(batches), loss=lambda model, batch: model(batch).sum(),
        )  # fmt: skip
