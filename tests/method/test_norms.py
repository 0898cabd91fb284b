"""Norms: which keep zeros, which hide a layer, and which mix channels."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from repr_det import RePr, RePrSchedule
from repr_det.errors import UserError
from repr_det.method.tracing import trace
from tests.method.found import Between, Pooled, dead, images, method_of, names_of
from tests.method.runs import train

# --- norms that do not keep zeros


class Shifting(nn.Module):
    """A norm, and what follows inside the same module or in a hook of it."""

    def __init__(self, channels: int, after) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.rand(channels)),
        )
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean((1, 2, 3), keepdim=True)
        return self.after(x * self.weight[:, None, None] + self.bias[:, None, None])


class ZeroCentred(nn.GroupNorm):
    """Its scale is one more than its weight, so a weight of zero does not silence a channel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight + 1, self.bias)


class SigmoidAfter(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(x))


class Activated(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.activation = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(super().forward(x))


class Conditional(nn.BatchNorm2d):
    """It adds something that a layer inside it computes."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.shift = nn.Linear(3, channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift(x[:, :3].mean((2, 3)))[..., None, None]


class Thresholded(nn.BatchNorm2d):
    """Its threshold is zero until it trains, as in filter response normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.threshold = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(super().forward(x), self.threshold)


class Split(nn.BatchNorm2d):
    """In training, half of the batch has a norm of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.second = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        a, b = x.chunk(2)
        return torch.cat([super().forward(a), self.second(b)])


def replaced_forward(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels)
    before = norm.forward
    norm.forward = lambda x: before(x) + 1
    return norm


NORMS = {
    "zero-centred scale": (lambda: ZeroCentred(1, 8), False),
    "threshold that trains": (lambda: Thresholded(8), False),
    "norm inside": (lambda: Split(8), False),
    "replaced forward": (lambda: replaced_forward(8), False),
    "activation that trains": (lambda: Activated(8), True),
    "sigmoid": (lambda: SigmoidAfter(8), False),
    "conditional shift": (lambda: Conditional(8), False),
    "threshold": (lambda: Shifting(8, lambda y: y.clamp(min=0.1)), False),
    "tanh": (lambda: Shifting(8, torch.tanh), True),
}


@pytest.mark.parametrize("name", NORMS)
def test_filters_take_part_only_if_their_norm_keeps_zeros(name):
    build, takes_part = NORMS[name]
    stem, head = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(stem, nn.Conv2d(8, 8, 1), build(), nn.Conv2d(8, 8, 1), *pool, head)
    before = copy.deepcopy(model.state_dict())
    assert ("1" in names_of(model, images())) is takes_part
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    units = [stem, *pool, nn.Linear(8, 8), nn.Unflatten(1, (8, 1, 1)), build(), nn.Flatten(), head]
    if takes_part:
        assert names_of(nn.Sequential(*units), images(), linear=True) == ["3"]
    else:
        with pytest.raises(UserError, match="the norm 5, which does not keep zeros"):
            method_of(nn.Sequential(*units), images(), linear=True)
    with nullcontext() if takes_part else pytest.raises(UserError, match="1 cannot lose filters"):
        method_of(model, images(), include=["1"])


@pytest.mark.parametrize(
    "norm",
    [nn.InstanceNorm1d(12), nn.BatchNorm1d(12, affine=False, track_running_stats=False)],
)
@pytest.mark.parametrize("tokens", [5, 12])
def test_norm_that_counts_another_dimension_hides_the_layer(norm, tokens):
    """Both take any number of channels, and here their channels are the tokens."""
    layers = nn.Linear(8, 8), nn.Linear(8, 12), norm, nn.SiLU(), nn.Linear(12, 8), nn.Linear(8, 4)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * tokens, 2))
    data = torch.randn(2, tokens, 8), torch.tensor([0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch mentions it, too
        assert names_of(model, data, linear=True) == ["4"]


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x)


def test_layer_whose_norm_computes_its_scale_takes_no_part():
    """Neither at set-up nor at a drop, which looks without gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)), Pooled(8)
    )
    assert names_of(model) == ["1", "3"]
    parametrize.register_parametrization(model[2], "weight", Positive())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method = method_of(model)
    assert [layer.name for layer in method.layers] == ["3"]
    method.step(1)
    assert [layer.name for layer in method.layers] == ["3"] == [*method.pruned]
    with pytest.raises(UserError, match="1 cannot lose filters, because something else uses its"):
        method_of(model, include=["1"])


def test_parameters_inside_a_norm_are_used():
    assert trace(Between(Activated(8))).not_run == []


def test_hook_that_changes_what_a_norm_returns_is_seen():
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)), Pooled(8)
    )
    assert dead(model, **{"1": [2]}) == {"3": [2]}
    model[2].register_forward_hook(lambda module, args, out: out + 1)
    assert dead(model, **{"1": [2]}) == {}


def with_spectral_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.SiLU(),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


def test_reading_a_spectral_norm_changes_nothing():
    model = with_spectral_norm()
    before = copy.deepcopy(dict(model.named_buffers()))
    trainer = torch.optim.SGD(model.parameters(), 0.1)
    method = RePr(model, trainer, RePrSchedule(1, 1, 1), exclude=["0"])
    method.step(1)
    state = method.state_dict()
    method.step(2)
    method.load_state_dict(state)
    assert before
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert all(module.training for module in model.modules())


# --- norms that mix channels


class LayerNormNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        y = self.norm(self.conv(torch.relu(self.stem(x))).permute(0, 2, 3, 1))
        return self.linear(torch.relu(y).mean((1, 2)))


def group_norm_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


@pytest.mark.parametrize("build_net", [group_norm_net, LayerNormNet])
def test_norms_that_mix_channels_differ_by_their_statistics(build_net):
    """Pruned channels are exactly zero behind the norm; what differs from a smaller network is that
    the survivors are normalised with the zeros counted in.

    With n of m channels of a group pruned, mean and mean square shrink by (m - n) / m. Survivors of
    the smaller norm are recomputed here from that alone.
    """
    torch.manual_seed(0)
    model = build_net().double()
    trainer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    name = "2" if isinstance(model, nn.Sequential) else "conv"
    method = RePr(model, trainer, RePrSchedule(1, 9, 1), 0.25, include=[name])
    method.step(1)
    mask = method.pruned[name]
    assert int(mask.sum()) == 2
    seen = {}
    conv = model.get_submodule(name)
    (link,) = method.layers[0].norms
    conv.register_forward_hook(lambda m, a, out: seen.update(conv=out.detach()))
    link.module.register_forward_hook(lambda m, a, out: seen.update(norm=out.detach()))
    for i in range(5):
        train(model, trainer, i, torch.float64)
        out = seen["norm"] if link.dim == 1 else seen["norm"].permute(0, 3, 1, 2)
        assert out[:, mask].abs().sum() == 0
    # Statistics of the smaller norm: over what is left of each group, per image or per position.
    groups = range(0, 8, 4) if link.dim == 1 else [0]
    width = 4 if link.dim == 1 else 8
    difference = 0.0
    for begin in groups:
        part, gone = seen["conv"][:, begin : begin + width], mask[begin : begin + width]
        axes = (1, 2, 3) if link.dim == 1 else (1,)
        kept = part[:, ~gone]
        smaller = (kept - kept.mean(axes, keepdim=True)) / torch.sqrt(
            kept.var(axes, correction=0, keepdim=True) + 1e-5
        )
        share = kept.shape[1] / width
        mean, square = (share * v.mean(axes, keepdim=True) for v in (kept, kept.square()))
        ours = (kept - mean) / torch.sqrt(square - mean.square() + 1e-5)
        full = torch.nn.functional.group_norm(part, 1) if link.dim == 1 else F.layer_norm(
            part.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2)  # fmt: skip
        torch.testing.assert_close(ours, full[:, ~gone])
        if gone.any():
            difference = max(difference, ((ours - smaller).abs().mean() / smaller.std()).item())
    # Measured with 2 of 8 channels pruned: 0.134 (GroupNorm) and 0.123 (LayerNorm) standard
    # deviations of the smaller norm's output, on average.
    assert 0.02 < difference < 0.4
