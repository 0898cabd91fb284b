"""Hidden units of linear layers as filters: which take part, and that promise 1 holds for them."""

from __future__ import annotations

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from repr_det import Reinit, RePr, RePrSchedule
from repr_det.errors import UserError
from repr_det.method.compact import Compact
from tests.grids import covering
from tests.method.nets import DEVICE, OPTIMIZERS, batch, loss
from tests.method.side_by_side import TOLERANCE, clip_all_by_norm, clip_by_norm, clip_by_value
from tests.method.smaller import (
    SmallerConv,
    SmallerLinear,
    SmallerNorm,
    cuts,
    full_weights,
    smaller,
)

WARM_UP, STEPS = 3, 30

# A bias without effect (before BatchNorm, of keys) has a gradient of rounding errors alone, which
# Adam would magnify. The networks have none.


class Mlp(nn.Module):
    """Linear layers after a conv, with a norm that directly follows one of them."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, stride=4)
        self.fc1, self.fc2 = nn.Linear(16, 14), nn.Linear(14, 12, bias=False)
        self.norm, self.dropout = nn.BatchNorm1d(12), nn.Dropout(dropout)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x)).flatten(1)
        x = self.dropout(F.gelu(self.fc1(x)))
        return self.head(self.dropout(F.silu(self.norm(self.fc2(x)))))


class Transformer(nn.Module):
    """A pre-norm block: attention and an MLP, each with a shortcut."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.places = nn.Parameter(torch.randn(4, 8))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(8) for _ in range(3))
        self.packed, self.project = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.fc1, self.fc2 = nn.Linear(8, 18), nn.Linear(18, 8)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        x = x + self.dropout(self.attend(self.norm1(x)))
        hidden = self.dropout(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))
        x = x + self.dropout(self.fc2(hidden))
        return self.head(self.norm3(x).mean(1))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.packed(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Multihead(Transformer):
    """The same with torch's attention, which uses weights of its own and of a linear layer."""

    def __init__(self, dropout: float) -> None:
        super().__init__(dropout)
        del self.packed, self.project
        self.attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Perceptron(nn.Sequential):
    """A network without a conv."""

    def __init__(self, dropout: float) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(192, 10), nn.GELU(), nn.Linear(10, 14), nn.SiLU(),
            nn.Dropout(dropout), nn.Linear(14, 12), nn.SiLU(), nn.Linear(12, 2),
        )  # fmt: skip


class ConvNeXtBlock(nn.Module):
    """Depthwise conv, LayerNorm, MLP, layer scale and stochastic depth, with a shortcut."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(0.5 * torch.ones(width, 1, 1))
        self.drop = StochasticDepth(dropout, "row")

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.fc2(F.gelu(self.fc1(y))).permute(0, 3, 1, 2)
        return x + self.drop(self.scale * y)


class ConvNeXt(nn.Module):
    """Two stages of one block each."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, stride=2)
        self.stages = nn.Sequential(
            ConvNeXtBlock(6, dropout), nn.Conv2d(6, 8, 2, stride=2), ConvNeXtBlock(8, dropout)
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class BoxHead(nn.Module):
    """A small backbone, and the box head of a detector with its two prediction layers."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.SiLU(),
            nn.AvgPool2d(2),
        )  # fmt: skip
        self.fc1, self.fc2 = nn.Linear(24, 20), nn.Linear(20, 16)
        self.scores, self.boxes = nn.Linear(16, 2), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.fc1(torch.flatten(self.body(x), 1)))
        x = F.silu(self.fc2(x), inplace=True)
        return self.scores(x) + self.boxes(x).unflatten(1, (2, 4)).square().mean(-1)


NETS = {
    "mlp": Mlp, "transformer": Transformer, "multihead": Multihead, "perceptron": Perceptron,
    "convnext": ConvNeXt, "box": BoxHead,
}  # fmt: skip
TAKE_PART = {
    "mlp": ["fc1", "fc2"],
    "transformer": ["fc1"],
    "multihead": ["fc1"],
    "perceptron": ["3", "6"],
    "convnext": ["stages.1", "stages.0.fc1", "stages.2.fc1"],
    "box": ["body.2", "fc1", "fc2"],
}


def net(name: str, dropout: float = 0.25, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name](dropout).to(DEVICE, dtype)


def method_of(model: nn.Module, trainer=None, **arguments) -> RePr:
    trainer = trainer or torch.optim.SGD(model.parameters(), 0.1)
    arguments = {"linear": True, "batches": lambda: iter([]), "loss": loss, **arguments}
    return RePr(model, trainer, RePrSchedule(WARM_UP, STEPS, 1), 0.3, **arguments)


def check_zero(method: RePr) -> None:
    """All that belongs to pruned filters is zero, and units are among them."""
    for layer in method.layers:
        slots = layer.filter_slots(method.pruned[layer.name])
        assert not any(slot.read().any() for slot in slots)
    assert sum(int(method.pruned[n].sum()) for n in method.graph.linears.keys() & method.pruned) > 1


def train_step(model, trainer, index, clip=None, precision=nullcontext):
    torch.manual_seed(index)  # both networks drop the same places
    trainer.zero_grad()
    dtype = next(model.parameters()).dtype
    with precision():
        value = loss(model, batch(index, dtype))
    value.backward()
    if clip is not None:
        clip(model)
    trainer.step()
    return value.item()


def dropped(name, optimizer, dropout=0.25, dtype=torch.float64, clip=None):
    """A network, its optimizer and its method right after a drop."""
    model = net(name, dropout, dtype)
    trainer = OPTIMIZERS[optimizer](model.parameters())
    method = method_of(model, trainer)
    for i in range(WARM_UP):
        method.step(i)
        train_step(model, trainer, i, clip)
    method.step(WARM_UP)
    units = sum(
        int(method.pruned[name].sum()) for name in method.graph.linears.keys() & method.pruned
    )
    assert units > 1
    return model, trainer, method


def others(reference):
    """Parameters of the smaller network that nothing is cut out of, by name."""
    replaced = [
        name
        for name, module in reference.named_modules()
        if isinstance(module, (SmallerConv, SmallerLinear, SmallerNorm))
    ]
    return {
        name: parameter
        for name, parameter in reference.named_parameters()
        if not any(name.startswith(f"{prefix}.") for prefix in replaced)
    }


def reference_of(model, trainer, optimizer):
    """The physically smaller network and its optimizer, with the state of what it keeps."""
    dtype = next(model.parameters()).dtype
    reference = smaller(model, lambda m: m(batch(0, dtype)[0]))
    full = dict(model.named_parameters())
    taken = {parameter: (full[name], lambda v: v) for name, parameter in others(reference).items()}
    for name, module in reference.named_modules():
        for key, parameter, take in cuts(module):
            taken[parameter] = (full[f"{name}.{key}"], take)
    reference_trainer = OPTIMIZERS[optimizer](list(taken))
    for parameter, (whole, take) in taken.items():
        reference_trainer.state[parameter].update(
            {
                key: take(value).clone() if value.dim() else value.clone()
                for key, value in trainer.state.get(whole, {}).items()
                if isinstance(value, Tensor)
            }
        )
    return reference, reference_trainer


def check_trains_alike(name, optimizer, dtype=torch.float64, clip=None):
    model, trainer, method = dropped(name, optimizer, dtype=dtype, clip=clip)
    reference, reference_trainer = reference_of(model, trainer, optimizer)
    rows = sum(
        int((~m.keep_out).sum()) for m in reference.modules() if isinstance(m, SmallerLinear)
    )
    assert rows == sum(
        int(method.pruned[n].sum()) for n in method.graph.linears.keys() & method.pruned
    )
    losses = [], []
    for i in range(WARM_UP, WARM_UP + STEPS):
        losses[0].append(train_step(model, trainer, i, clip))
        losses[1].append(train_step(reference, reference_trainer, i, clip))
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(*losses, **tolerance)
    mine = dict(model.named_parameters())
    expected = {**full_weights(reference), **others(reference)}
    assert mine.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            mine[key].detach(), value.detach(), **tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )
    check_zero(method)
    outputs = [network.eval()(batch(0, dtype)[0]) for network in (model, reference)]
    torch.testing.assert_close(*outputs, **tolerance)


@pytest.mark.parametrize("name", NETS)
def test_hidden_units_take_part(name):
    assert [layer.name for layer in method_of(net(name)).layers] == TAKE_PART[name]


@pytest.mark.parametrize(("name", "optimizer"), covering(NETS, OPTIMIZERS))
def test_trains_as_the_smaller_network(name, optimizer):
    check_trains_alike(name, optimizer)


@pytest.mark.parametrize("clip", [clip_by_norm, clip_all_by_norm, clip_by_value])
@pytest.mark.parametrize("name", ["transformer", "box"])
def test_clipping_sees_the_smaller_network(name, clip):
    check_trains_alike(name, "adamw", clip=clip)


@pytest.mark.parametrize("name", ["transformer", "convnext"])
def test_float32(name):
    check_trains_alike(name, "momentum", torch.float32)


@pytest.mark.parametrize("name", NETS)
def test_held_in_mixed_precision(name):
    """Rounded to bfloat16, the smaller network's losses differ in the third digit."""

    def precision():
        return torch.autocast(torch.device(DEVICE).type, torch.bfloat16)

    model, trainer, method = dropped(name, "adamw", dtype=torch.float32)
    reference, reference_trainer = reference_of(model, trainer, "adamw")
    for i in range(WARM_UP, WARM_UP + 8):
        mine = train_step(model, trainer, i, clip_all_by_norm, precision)
        theirs = train_step(reference, reference_trainer, i, clip_all_by_norm, precision)
        assert mine == pytest.approx(theirs, rel=2e-2)
    check_zero(method)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("name", NETS)
def test_removed_units_train_as_held_ones(name, optimizer):
    model, trainer, method = dropped(name, optimizer, dropout=0.0)
    twin, twin_trainer, _ = dropped(name, optimizer, dropout=0.0)
    method.batches = lambda: iter([batch(0)])
    compact = Compact(method)
    shrunk = compact.shrink()
    units = {n: int(method.pruned[n].sum()) for n in method.graph.linears.keys() & method.pruned}
    assert shrunk.removed >= sum(units.values()) and shrunk.after < shrunk.before
    for layer, count in units.items():
        linear, full = model.get_submodule(layer), twin.get_submodule(layer)
        assert linear.out_features == len(linear.weight) == full.out_features - count
    tolerance = {"rtol": TOLERANCE[torch.float64], "atol": TOLERANCE[torch.float64]}
    for i in range(WARM_UP, WARM_UP + 12):
        losses = train_step(model, trainer, i), train_step(twin, twin_trainer, i)
        torch.testing.assert_close(*losses, **tolerance)
    compact.grow()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)
        states = trainer.state[mine], twin_trainer.state[theirs]
        torch.testing.assert_close(*states, **tolerance)
    check_zero(method)


def test_units_with_dropout_stay_as_zeros():
    """Fewer units would be dropped out by other draws."""
    model, trainer, method = dropped("transformer", "adamw")
    method.batches = lambda: iter([batch(0)])
    compact = Compact(method)
    assert compact.shrink().removed == 0


@pytest.mark.parametrize("name", NETS)
def test_units_return_orthogonal_with_a_new_state(name):
    model, trainer, method = dropped(name, "adamw")
    pruned = method.pruned
    before = {layer.name: layer.matrix().clone() for layer in method.layers}
    gone = {n: v["weight"] for n, v in method.state_dict()["before"].items()}
    method.step(WARM_UP + STEPS)
    for layer in method.layers:
        chosen, rows = pruned[layer.name], F.normalize(layer.matrix())
        if not chosen.any():
            continue
        new = rows[chosen]
        old = F.normalize(torch.cat([before[layer.name][~chosen], gone[layer.name]]))
        if len(old) + len(new) <= layer.dimension:
            assert (new @ old.T).abs().max() < 1e-10
        moments = layer.matrix(trainer.state[layer.weight]["exp_avg"])
        assert not moments[chosen].any() and moments[~chosen].any()
        for reader in method.graph.readers.values():
            if layer.name in reader.filters and isinstance(reader.module, nn.Linear):
                channels, filters = reader.filters[layer.name]
                columns = reader.module.weight[:, channels[chosen[filters]]]
                stayed = ~pruned.get(reader.name, torch.zeros(len(columns), dtype=torch.bool))
                assert not columns[stayed].any()  # outgoing weights begin at zero


def test_previous_units_return_as_they_were():
    model = net("transformer")
    trainer = OPTIMIZERS["adamw"](model.parameters())
    method = method_of(model, trainer, reinit=Reinit(direction="previous"))
    before = copy.deepcopy(model.state_dict())
    method.step(WARM_UP)
    assert not torch.equal(model.fc1.weight, before["fc1.weight"])
    method.step(WARM_UP + STEPS)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", ["transformer", "perceptron"])
def test_run_resumed_in_any_phase_ends_with_the_same_bits(name):
    def made():
        model = net(name)
        trainer = OPTIMIZERS["adamw"](model.parameters())
        return model, trainer, method_of(model, trainer)

    ends = []
    for stop in (None, 2, WARM_UP + 2, WARM_UP + STEPS + 1):
        three = made()
        for i in range(WARM_UP + STEPS + 3):
            if i == stop:
                file = io.BytesIO()
                torch.save([x.state_dict() for x in three], file)
                file.seek(0)
                three = made()
                for x, state in zip(three, torch.load(file), strict=True):
                    x.load_state_dict(state)
            three[2].step(i)
            train_step(*three[:2], i)
        ends.append(three[0].state_dict())
    for end in ends[1:]:
        assert all(torch.equal(ends[0][key], end[key]) for key in end)


def test_resuming_needs_the_same_choice():
    model = net("box")
    state = method_of(model).state_dict()
    with pytest.raises(UserError, match="linear was True, is False"):
        method_of(model, linear=False).load_state_dict(state)
    state = method_of(model, linear=False).state_dict()
    del state["settings"]["linear"], state["graph"]["linears"], state["graph"]["visible"]
    method_of(model, linear=False).load_state_dict(state)  # as an older version wrote it


# --- which layers


def names(model: nn.Module, **arguments) -> list[str]:
    return [layer.name for layer in method_of(model, **arguments).layers]


def test_linear_layers_are_off_by_default():
    assert names(net("box"), linear=False) == ["body.2"]
    assert names(net("box"), linear=False, include=["*"]) == ["body.0", "body.2"]


def test_pattern_that_names_linear_layers_brings_them_in():
    for pattern in ("fc*", "fc[12]"):
        assert names(net("box"), linear=False, include=[pattern]) == ["fc1", "fc2"]
    assert names(net("box"), linear=False, include=["body", "fc1"]) == ["body.2", "fc1"]
    assert names(net("box"), exclude=["fc1"]) == ["body.2", "fc2"]
    assert names(net("box"), include=["*"]) == ["body.0", "body.2", "fc1", "fc2"]


@pytest.mark.parametrize(
    ("name", "pattern", "reason"),
    [
        ("transformer", "packed", "its units go into aten::view"),
        ("transformer", "project", "its units go into aten::add"),
        ("box", "scores", "its units go into aten::add"),
        ("mlp", "head", "its units go into the output of the model"),
        ("multihead", "attention", "its weight is used elsewhere"),
    ],
)
def test_layer_whose_units_are_seen_is_refused(name, pattern, reason):
    with pytest.raises(UserError, match=f"{pattern}.* cannot take part, {reason}"):
        method_of(net(name), include=[pattern])


class Gated(nn.Module):
    """An MLP in one of several forms, between a conv and a head."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.stem, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 2)
        self.up, self.gate, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.packed, self.norm = nn.Linear(8, 24), nn.RMSNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head((x + self.down(getattr(self, self.form)(x))).mean(1))

    def swiglu(self, x):
        return F.silu(self.up(x)) * self.gate(x)

    def packed_swiglu(self, x):
        a, b = self.packed(x).chunk(2, -1)
        return F.silu(a) * b

    def quick_gelu(self, x):
        x = self.up(x)
        return x * torch.sigmoid(1.702 * x)

    def glu(self, x):
        return F.glu(self.packed(x), -1)

    def sigmoid(self, x):
        return torch.sigmoid(self.up(x))

    def softmax(self, x):
        return self.up(x).softmax(-1)

    def normed(self, x):
        return self.norm(F.gelu(self.up(x)))

    def squared(self, x):
        return F.relu(self.up(x)).square()

    def kept(self, x):
        return self.up(x) + 1.0

    def chosen(self, x):
        x = self.up(x)
        return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y * 3, (x,))

    def alone(self, x):
        x, y = self.up(x)[:, None], self.gate(x)[:, None]
        return F.scaled_dot_product_attention(y, y, x)[:, 0]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("swiglu", ["up"]), ("packed_swiglu", []), ("glu", []), ("sigmoid", []), ("softmax", []),
        ("normed", ["up"]), ("squared", ["up"]), ("kept", []), ("alone", ["up"]), ("chosen", []),
    ],
)  # fmt: skip
def test_only_units_that_stay_zero_take_part(form, expected):
    model = Gated(form).double()
    if not expected:
        with pytest.raises(UserError, match="found no filters"):
            names(model)
        return
    method = method_of(model)
    assert [layer.name for layer in method.layers] == expected
    seen = []
    model.down.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    method.step(WARM_UP)
    model(batch(0)[0])
    gone = method.pruned["up"]
    assert not seen[-1][..., gone].any() and seen[-1][..., ~gone].any()


def test_packed_halves_are_left_out_with_a_reason():
    """A unit of either half silences a product, and a filter has one way to be zero here."""
    reason = "no linear layer has hidden units: of packed, its units go into aten::mul"
    with pytest.raises(UserError, match=reason):
        names(Gated("packed_swiglu"))
    with pytest.raises(UserError, match=r"aten::sigmoid"):
        names(Gated("quick_gelu"))


def test_network_without_convs_needs_linear_layers():
    assert names(net("perceptron"), linear=False, include=["3"]) == ["3"]
    with pytest.raises(UserError, match=r"no conv layer, and linear .* Set|set REPR.LINEAR"):
        names(net("perceptron"), linear=False)
    with pytest.raises(UserError, match="names that exist are, for example: 1, 3"):
        names(net("perceptron"), include=["fc"])


def test_first_linear_layer_takes_part_by_name():
    """It reads the image, as a stem does. The error says so where no other layer is hidden."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.SiLU(), nn.Linear(10, 2)).double()
    with pytest.raises(UserError, match="1 reads the input or is excluded. Name it in INCLUDE"):
        names(model)
    assert names(model, include=["1"]) == ["1"]


def test_layer_whose_weight_is_computed_is_refused_with_the_reason():
    model = net("box")
    nn.utils.parametrizations.weight_norm(model.fc1)
    with pytest.raises(UserError, match="fc1 cannot take part, its weight is computed from"):
        names(model, include=["fc1"])


class Encoder(nn.Module):
    """torch's own encoder, which evaluates a block in one fused operation."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_torchs_encoder_evaluates_alike_with_units_removed(activation):
    torch.manual_seed(0)
    model = Encoder(activation).double()
    method = method_of(model, batches=lambda: iter([batch(0)]))
    assert [layer.name for layer in method.layers] == [f"blocks.layers.{i}.linear1" for i in (0, 1)]
    method.step(WARM_UP)
    model.eval()
    held = [model(batch(0)[0])]
    with torch.no_grad():
        held.append(model(batch(0)[0]))  # fused
    compact = Compact(method)
    assert compact.shrink().removed == method.num_pruned > 1
    with torch.no_grad():
        removed = model.eval()(batch(0)[0])
    for output in held:
        torch.testing.assert_close(output, removed, rtol=1e-10, atol=1e-10)


def test_hook_that_changes_what_a_layer_returns_is_seen():
    model = net("box")
    model.fc2.register_forward_hook(lambda module, args, out: out + 1)
    assert names(model) == ["body.2", "fc1"]


class Outputs(dict):
    """A container of its own kind."""


class Conditioned(nn.LayerNorm):
    """Units of another layer scale the result."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x) * (1 + scale)


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.main, self.scale = nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(8, 12)
        self.norm, self.last, self.other = Conditioned(12), nn.Linear(12, 2), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        scale = self.scale(x)
        return self.last(F.silu(self.norm(self.main(x), scale))) + self.other(scale)


def test_units_that_a_norm_gets_as_another_argument_are_not_hidden():
    assert names(Conditional(), batches=None, loss=None) == ["main"]


KEPT: list[Tensor] = []
SHOWN = {
    "attribute": lambda model, y, h: (setattr(model, "features", h), y)[1],
    "list outside": lambda model, y, h: (KEPT.append(h), y)[1],
    "container of its own kind": lambda model, y, h: Outputs(y=y, h=h),
    "generator": lambda model, y, h: (part for part in (y, h)),
    "function": lambda model, y, h: (y, lambda: h),
}


class Shows(nn.Module):
    def __init__(self, show) -> None:
        super().__init__()
        self.stem, self.first = nn.Linear(8, 8), nn.Linear(8, 12)
        self.second, self.head, self.show = nn.Linear(12, 8), nn.Linear(8, 2), show

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.first(self.stem(x)))
        return self.show(self, self.head(F.silu(self.second(h))), h)


@pytest.mark.parametrize("show", SHOWN)
def test_units_that_outlive_the_forward_pass_are_not_hidden(show):
    """A loss may read them."""
    given = {"batches": None, "loss": None}
    assert names(Shows(lambda model, y, h: y), **given) == ["first", "second"]
    try:
        assert names(Shows(SHOWN[show]), **given) == ["second"]
    finally:
        KEPT.clear()


class LastFrozen(nn.Module):
    """A norm over the last dimension whose statistics do not train."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.linspace(-1, 1, width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) * self.running_var.rsqrt() * self.weight + self.bias


def test_frozen_norm_over_the_last_dimension_is_calibrated():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 8), nn.Linear(8, 20), LastFrozen(20), nn.SiLU(), nn.Linear(20, 2)
    ).double()
    model.load_state_dict({**model.state_dict(), "1.bias": torch.ones(20, dtype=torch.float64)})
    method = method_of(
        model,
        batches=lambda: iter([batch(0)]),
        loss=lambda network, data: network(data[0]).square().mean(),
    )
    method.step(WARM_UP)
    gone = method.pruned["1"]
    method.step(WARM_UP + STEPS)
    x = model[1](model[0](batch(0)[0])).detach().flatten(0, 2)
    torch.testing.assert_close(model[2].running_mean[gone], x.mean(0)[gone])
    torch.testing.assert_close(model[2].running_var[gone], x.var(0, correction=0)[gone])


@pytest.mark.parametrize("criterion", ["activations", "apoz", "taylor", "gradients", "weights"])
def test_criteria_score_units(criterion):
    model = net("transformer")
    method = method_of(model, criterion=criterion, batches=lambda: iter([batch(0)]))
    method.step(WARM_UP)
    assert method.num_pruned == round(0.3 * 18)
