"""An optimizer is accepted for what it does to zeros and to filters that return."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from repr_det import RePr, RePrSchedule
from repr_det.errors import UserError
from repr_det.method.optimizers import check_optimizer
from tests.method.mixing import Centralised, OfTheGroup, OnEach
from tests.method.nets import batch, check_held, loss, net

ELEMENTWISE = (
    "SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop",
    "Rprop", "ASGD",
)  # fmt: skip


def weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(s)) for s in ((8, 4, 3, 3), (8,), (5, 8))]


class Sign(OnEach):
    def update(self, p, state, group):
        p.sub_(group["lr"] * p.grad.sign())


class TrustRatio(OnEach):
    """The length of a step is that of the weight, as in LARS."""

    def update(self, p, state, group):
        p.sub_(group["lr"] * p.grad * p.norm() / (p.grad.norm() + 1e-9))


class NormClip(OnEach):
    def update(self, p, state, group):
        p.sub_(group["lr"] * p.grad * (0.1 / p.grad.norm()).clamp(max=1))


class MeanClip(OnEach):
    """Clips by the mean square over a weight; only large gradients show it."""

    def update(self, p, state, group):
        size = p.grad.square().mean().sqrt()
        p.sub_(group["lr"] * p.grad * (group.get("clip", 5.0) / size).clamp(max=1))


class Noisy(OnEach):
    def update(self, p, state, group):
        p.sub_(group["lr"] * (p.grad + 1e-6 * torch.randn_like(p)))


class RowMeans(OnEach):
    """Divides by the root mean square of each row, as factored moments do."""

    def update(self, p, state, group):
        mean = p.grad.reshape(len(p), -1).square().mean(1).add(1e-9).sqrt()
        p.sub_(group["lr"] * p.grad / mean.reshape(-1, *[1] * (p.dim() - 1)))


class SlowWeights(OnEach):
    """Lookahead: every ``k`` steps half way back to a slow copy."""

    def update(self, p, state, group):
        if not state:
            state.update(slow=p.clone(), step=0)
        p.sub_(group["lr"] * p.grad)
        state["step"] += 1
        if state["step"] % group.get("k", 10) == 0:
            p.copy_(state["slow"].lerp_(p, 0.5))


class HiddenSlowWeights(OnEach):
    """The same with the copy where no state is looked for."""

    def update(self, p, state, group):
        held = self.__dict__.setdefault("held", {})
        slow = held.setdefault(p, p.clone())
        p.sub_(group["lr"] * p.grad).lerp_(slow, 0.1)
        slow.lerp_(p, 0.1)


class ScheduleFree(OnEach):
    def update(self, p, state, group):
        z = state.setdefault("z", p.clone())
        p.lerp_(z, 0.1)
        z.sub_(group["lr"] * p.grad)


class FromTheStart(OnEach):
    """MADGRAD's and FTRL's way: the weight is the start and the sum of all gradients."""

    def update(self, p, state, group):
        start = state.setdefault("start", p.clone())
        total = state.setdefault("total", torch.zeros_like(p)).add_(p.grad)
        p.copy_(start - group["lr"] * total)


class MasterWeights(OnEach):
    def update(self, p, state, group):
        master = state.setdefault("master", p.double().clone())
        p.copy_(master.sub_(group["lr"] * p.grad))


class Factored(OnEach):
    """State of another shape that happens to work elementwise: removal could not cut it."""

    def update(self, p, state, group):
        state.setdefault("flat", torch.zeros(p.numel(), dtype=p.dtype)).add_(p.grad.flatten())
        p.sub_(group["lr"] * state["flat"].reshape(p.shape))


class Nested(OnEach):
    def update(self, p, state, group):
        state.setdefault("moments", [torch.zeros_like(p)])[0].lerp_(p.grad, 0.1)
        p.sub_(group["lr"] * p.grad)


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_elementwise_optimizers_of_torch_are_accepted(name, decay):
    options = {} if name == "Rprop" else {"weight_decay": decay}
    check_optimizer(getattr(torch.optim, name)(weights(), **options))


@pytest.mark.parametrize(
    "make",
    [
        Sign, TrustRatio, NormClip,
        lambda p: torch.optim.ASGD(p, lambd=0.1, t0=2),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, torch.tensor(0.1), amsgrad=True, capturable=True),
        lambda p: torch.optim.AdamW(p, 0.1, fused=True),
        lambda p: torch.optim.SGD(p, 0.1, foreach=True, maximize=True),
        lambda p: torch.optim.SGD([{"params": [x], "lr": 0.1} for x in p], 0.1),
        lambda p: OfTheGroup([{"params": p[:1]}, {"params": p[1:], "central": False}]),
    ],
)  # fmt: skip
def test_what_leaves_zeros_alone_is_accepted(make):
    check_optimizer(make(weights()))


class Followed(nn.Module):
    """Three convs after a stem; something may be between the first two."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
        self.c, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)
        self.scale, self.slopes = nn.Parameter(torch.rand(12, 1, 1) + 0.5), nn.PReLU(12)
        self.number, self.between = nn.Parameter(torch.ones(1)), between

    def forward(self, x):
        y = self.a(self.stem(x))
        y = {
            "nothing": lambda: y,
            "a scale": lambda: self.scale * y,
            "slopes": lambda: self.slopes(y),
            "one number": lambda: self.number * y,
            "a sum without a rule": lambda: torch.stack([y, y]).sum(0),
        }[self.between]()
        return self.head(nn.functional.silu(self.c(self.b(y))).mean((2, 3)))


@pytest.mark.parametrize(
    ("between", "takes_part"),
    [
        ("nothing", True), ("one number", True), ("a scale", False), ("slopes", False),
        ("a sum without a rule", False),
    ],
)  # fmt: skip
def test_with_trust_ratios_all_that_reads_a_filter_must_be_known(between, takes_part):
    """A weight that reads zeros and is not zero itself would count in the length of the whole."""
    torch.manual_seed(0)
    model = Followed(between)
    for name, p in model.named_parameters():
        p.requires_grad_(name != "scale" or between == "a scale")
    schedule = RePrSchedule(1, 9, 1)
    method = RePr(model, torch.optim.SGD(model.parameters(), 0.1), schedule)
    assert [layer.name for layer in method.layers] == ["a", "b", "c"]
    with nullcontext() if takes_part else pytest.warns(UserWarning, match="a .*cannot lose filt"):
        method = RePr(model, TrustRatio(model.parameters()), schedule)
    assert [layer.name for layer in method.layers] == ["a", "b", "c"][not takes_part :]


@pytest.mark.parametrize(
    ("make", "scales"),
    [
        (TrustRatio, True), (Sign, False), (NormClip, False),
        (lambda p: torch.optim.AdamW(p, weight_decay=0.1), False),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1), False),
    ],
)  # fmt: skip
def test_trust_ratios_are_found(make, scales):
    assert check_optimizer(make(weights())) is scales


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: Centralised(p, lr=0.1), "do not stay zero"),
        (lambda p: Centralised(p, lr=0.1, momentum=0.9), "do not stay zero"),
        (Noisy, "do not stay zero"),
        (MeanClip, "does not step as"),
        (lambda p: MeanClip(p, clip=500.0), "does not step as"),
        (RowMeans, "does not step as"),
        (lambda p: OfTheGroup([{"params": p[:1]}, {"params": p[1:], "central": True}]), "not stay"),
        (SlowWeights, "would move without a gradient"),
        (lambda p: SlowWeights(p, k=7), "would move without a gradient"),
        (HiddenSlowWeights, "do not stay zero"),
        (ScheduleFree, "would move without a gradient"),
        (FromTheStart, "would move without a gradient"),
        (MasterWeights, "would move without a gradient"),
        (Factored, "more than numbers and tensors of the weight's shape"),
        (Nested, "more than numbers and tensors of the weight's shape"),
        (torch.optim.Adafactor, "does not step as"),
        pytest.param(
            lambda p: torch.optim.Muon([x for x in p if x.dim() == 2]),
            "does not step as",
            marks=pytest.mark.skipif(
                not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon"
            ),
        ),
        (torch.optim.LBFGS, "^RePr: LBFGS cannot step without a closure"),
        (torch.optim.SparseAdam, "could not be tried .*dense gradients"),
    ],
)  # fmt: skip
def test_what_does_not_is_refused_with_the_reason(make, reason):
    with pytest.raises(UserError, match=reason):
        check_optimizer(make(weights()))


def test_a_rate_of_zero_hides_nothing():
    """As at the first step of a warm-up."""
    with pytest.raises(UserError, match="do not stay zero"):
        check_optimizer(Centralised(weights(), lr=0.0))
    trainer = Centralised(weights(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(trainer, lambda i: i / 10)
    assert trainer.param_groups[0]["lr"] == 0
    with pytest.raises(UserError, match="do not stay zero"):
        check_optimizer(trainer)


def test_attributes_of_an_optimizer_count():
    class Switched(Centralised):
        def __init__(self, params, lr, central=False):
            super().__init__(params, lr)
            self.central = central

        def step(self, closure=None):
            (super() if self.central else super(Centralised, self)).step(closure)

    check_optimizer(Switched(weights(), 0.1))
    with pytest.raises(UserError, match="do not stay zero"):
        check_optimizer(Switched(weights(), 0.1, central=True))


class Around(torch.optim.Optimizer):
    """Steps by another optimizer, whose state can be its own."""

    def __init__(self, inner, shares_state):
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.param_groups = inner, inner.param_groups
        if shares_state:
            self.state = inner.state

    def step(self, closure=None):
        self.inner.step(closure)


def test_an_optimizer_around_another_is_tried():
    """State that is not its own could not be set to zero with the filters."""
    check_optimizer(Around(torch.optim.Adam(weights(), 0.1), shares_state=True))
    with pytest.raises(UserError, match="set to zero with their state do not stay zero"):
        check_optimizer(Around(torch.optim.Adam(weights(), 0.1), shares_state=False))
    with pytest.raises(UserError, match="does not step as"):
        check_optimizer(Around(MeanClip(weights()), shares_state=True))


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(UserError, match="the optimizer is a list. Pass a torch.optim.Optimizer"):
        check_optimizer([1])


def test_sharded_weights_are_refused(tmp_path):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
        fsdp.fully_shard(model, mesh=mesh)
        with pytest.raises(UserError, match="sharded .* Use DistributedDataParallel"):
            check_optimizer(torch.optim.SGD(model.parameters(), 0.1))
    finally:
        torch.distributed.destroy_process_group()


def test_trying_leaves_everything_as_it_is():
    parameters = weights()
    trainer = torch.optim.Adam(parameters, 0.1)
    calls = []
    trainer.register_step_pre_hook(lambda *_: calls.append(1))
    before = copy.deepcopy([p.detach() for p in parameters])
    torch.manual_seed(3)
    state = torch.get_rng_state()
    check_optimizer(trainer)
    with pytest.raises(UserError):
        check_optimizer(Noisy(parameters))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    assert not trainer.state and not calls and all(p.grad is None for p in parameters)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_accepted_optimizers_hold_filters_at_zero(name):
    model = net("chain", torch.float32)
    trainer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    method = RePr(model, trainer, RePrSchedule(2, 9, 1), 0.4)
    for i in range(8):
        method.step(i)
        trainer.zero_grad()
        loss(model, batch(i, torch.float32)).backward()
        trainer.step()
        if i >= 2:
            check_held(method)
            assert all(layer.weight.isfinite().all() for layer in method.layers)
